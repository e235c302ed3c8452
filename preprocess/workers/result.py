"""What becomes of an image: a JPEG file as it is stored, or the reason why it cannot be stored."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["Bad", "Encoded", "ImageState"]


class ImageState(IntEnum):
    """What became of an image. The numbers are part of the records of unfinished conversions: never renumber."""

    REENCODED = 1
    KEPT = 2  # with the DCT coefficients of the original
    BAD = 3


class Encoded(NamedTuple):
    """An image as it is stored: a JPEG file's bytes, its size in pixels, whether its coefficients are the original's
    (`kept`), and the CRC-32 of the bytes."""

    data: bytes | memoryview
    height: int
    width: int
    kept: bool
    crc32: int

    @property
    def state(self) -> ImageState:
        return ImageState.KEPT if self.kept else ImageState.REENCODED


class Bad(NamedTuple):
    """An image that cannot be stored, and why: part of a sentence, without the image's name."""

    reason: str
