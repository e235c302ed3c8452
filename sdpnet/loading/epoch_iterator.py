"""The iterator over the batches of one epoch, which its loader can end."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from sdpnet.pipelines.errors import UserError

__all__ = ["EpochIterator"]

_Item = TypeVar("_Item")


class EpochIterator(Iterator[_Item], Generic[_Item]):
    """Yields what a generator yields, until `end` is called. When it is collected, the generator is closed.

    Args:
        batches: the generator.
    """

    def __init__(self, batches: Generator[_Item, None, None]) -> None:
        self._batches = batches
        self._reason = ""

    def __next__(self) -> _Item:
        if self._reason:
            raise UserError(self._reason)
        return next(self._batches)

    def end(self, reason: str) -> None:
        """Ends the generator's work. `next` raises a `UserError` with the reason from now on."""
        self._reason = reason
        self._batches.close()
