"""Converts a decoded image to RGB a few rows at a time, so that the whole image is never in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

import numpy as np
from PIL import Image

from sdpnet.pipelines.images.area import Reduction, fit

__all__ = ["Picture", "Pixels"]

_BAND_PIXELS: Final = 1 << 21  # the number of pixels that are converted at a time
# By EXIF orientation: the transposition that makes an image upright, whether its rows are columns of the file, and
# whether they are in reverse order.
_TURNS: Final = {
    1: (None, False, False),
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, False),
    3: (Image.Transpose.ROTATE_180, False, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, True, True),
}


class _Decoded(Protocol):
    """The part of Pillow's `Image` that is needed. `size` is (width, height); a box is (left, upper, right, lower)."""

    @property
    def size(self) -> tuple[int, int]: ...
    def crop(self, box: tuple[int, int, int, int]) -> Image.Image: ...


class Pixels:
    """RGB pixels, uint8 (height, width, 3), used like a Pillow image, which would need a copy of them."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.size = pixels.shape[1], pixels.shape[0]

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        left, upper, right, lower = box
        return Image.fromarray(np.ascontiguousarray(self._pixels[upper:lower, left:right]))


class Picture:
    """A decoded image whose rows are converted to RGB and turned upright when they are read.

    Args:
        image: the decoded image, of any mode.
        to_rgb: converts a piece of the image to mode RGB, pixel by pixel. Its errors are passed on.
        orientation: the EXIF orientation, 1 to 8.

    Attributes:
        height, width: the size in pixels after turning.
    """

    def __init__(self, image: _Decoded, to_rgb: Callable[[Image.Image], Image.Image], orientation: int = 1) -> None:
        self._image, self._to_rgb = image, to_rgb
        self._turn, self._swaps, self._reverses = _TURNS[orientation]
        self.width, self.height = image.size[::-1] if self._swaps else image.size

    def rows(self, first: int, last: int) -> np.ndarray:
        """The rows from `first` to `last` - 1: uint8 (last - first, width, 3)."""
        start, end = (self.height - last, self.height - first) if self._reverses else (first, last)
        width, height = self._image.size
        piece = self._to_rgb(self._image.crop((start, 0, end, height) if self._swaps else (0, start, width, end)))
        return np.asarray(piece if self._turn is None else piece.transpose(self._turn))

    def bands(self) -> Iterator[tuple[int, int]]:
        """Yields the first row of each band and the first row after it."""
        step = max(1, _BAND_PIXELS // self.width)
        return ((first, min(first + step, self.height)) for first in range(0, self.height, step))

    def pixels(self) -> np.ndarray:
        """The whole image: uint8 (height, width, 3), in memory of its own."""
        if self.height * self.width <= _BAND_PIXELS:
            return np.array(self.rows(0, self.height))
        pixels = np.empty((self.height, self.width, 3), np.uint8)
        for first, last in self.bands():
            pixels[first:last] = self.rows(first, last)
        return pixels

    def reduced(self, max_side: int) -> np.ndarray:
        """The image reduced so that no side is longer than `max_side`: uint8 (h, w, 3).

        The result is that of `sdpnet.pipelines.images.area.average`; it is computed band by band.
        """
        width, height = fit(self.width, self.height, max_side)
        reduction = Reduction(self.height, self.width, height, width)
        for first, last in self.bands():
            reduction.add(self.rows(first, last))
        return reduction.result()
