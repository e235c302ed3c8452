"""The epochs of a loader: their iterators, and the place that a state describes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from sdpnet.pipelines.errors import UserError

__all__ = ["EpochIterator", "Progress"]

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


class Progress:
    """Which epoch an iterator begins, and how far the newest one is.

    Attributes:
        place: the epoch and the number of its batches that are done, for a state.
    """

    def __init__(self) -> None:
        self.place = self._next = 0, 0  # _next: where the next iterator begins
        self._newest = 0  # the number of the iterator that `place` follows, from 1; 0 if it follows none
        self._num_iterators = 0

    def begin(self) -> tuple[int, int, int]:
        """Begins an iterator. Returns its number, its epoch and its first batch."""
        epoch, start = self.place = self._next
        self._next = epoch + 1, 0
        self._newest = self._num_iterators = self._num_iterators + 1
        return self._newest, epoch, start

    def move(self, number: int, epoch: int, batch: int) -> None:
        """Notes that an iterator has come to a place. Only the newest one counts."""
        if number == self._newest:
            self.place = epoch, batch

    def choose(self, epoch: int) -> None:
        """Lets the next iterator begin an epoch; at its first batch, unless a place in this very epoch was restored."""
        if epoch != self._next[0]:
            self._next = epoch, 0
        self.place = self._next

    def restore(self, epoch: int, batch: int) -> None:
        """Lets the next iterator begin at a place. Iterators that exist no longer count."""
        self.place = self._next = epoch, batch
        self._newest = 0
