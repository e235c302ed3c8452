"""The result of encoding an image: the JPEG file that is stored, or the reason why there is none."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["Bad", "Encoded", "ImageState"]


class ImageState(IntEnum):
    """The result for an image. The records of unfinished conversions have these numbers, so they must never change."""

    REENCODED = 1
    KEPT = 2  # with the DCT coefficients of the original
    BAD = 3


class Encoded(NamedTuple):
    """An encoded image.

    Attributes:
        data: the bytes of the JPEG file.
        height, width: its size in pixels.
        kept: whether it has the DCT coefficients of the original.
        crc32: the CRC-32 of `data`.
    """

    data: bytes | memoryview
    height: int
    width: int
    kept: bool
    crc32: int

    @property
    def state(self) -> ImageState:
        """The state of the image in the records of a conversion."""
        return ImageState.KEPT if self.kept else ImageState.REENCODED


class Bad(NamedTuple):
    """An image that cannot be stored. `reason` is part of a sentence, without the name of the image."""

    reason: str
