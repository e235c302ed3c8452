"""Which parts a run of so many minutes does, and how long each of them may take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sdpnet.gpu_checks.part import Part, Size

__all__ = ["SPARE", "chosen", "limit_of"]

PATIENCE: Final = 1.6  # a part may take this many times as long as expected
LEAST: Final = 0.5  # a part does not start with less than this share of its expected time
SPARE: Final = 5.0  # seconds that are kept for the end


def chosen(parts: Sequence[Part], seconds: float, size: Size) -> list[str]:
    """The names of the parts that fit into the time together, in the order of `parts`.

    They are taken in the order of their ranks. A part that is too long makes room for shorter ones of less worth.
    """
    left, names = seconds - SPARE, set()
    for part in sorted(parts, key=lambda part: part.rank):
        if part.expected(size) <= left:
            left -= part.expected(size)
            names.add(part.name)
    return [part.name for part in parts if part.name in names]


def limit_of(part: Part, left: float, size: Size) -> float:
    """The seconds that a part may take when so many are left; 0 if it should not start."""
    expected, left = part.expected(size), left - SPARE
    if left < LEAST * expected:
        return 0.0
    return left if part.takes_rest else min(left, PATIENCE * expected + 10)
