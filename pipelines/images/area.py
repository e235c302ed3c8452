"""Reduces images by exact area averaging, as OpenCV's INTER_AREA does. The native codec gives the same bits.

Pillow's BOX filter is not used because it does not weight the pixels that an output pixel covers in part. From 580 to
500 pixels, it is off by 6.5 levels on average, which is the aliasing of nearest neighbours (records/LOG.md).
"""

from __future__ import annotations

import numpy as np

__all__ = ["Reduction", "average", "fit"]


def fit(width: int, height: int, max_side: int) -> tuple[int, int]:
    """The width and height of an image after its longer side is reduced to `max_side` pixels; 0 keeps every size."""
    longest = max(width, height)
    if max_side == 0 or longest <= max_side:
        return width, height
    return tuple(max(1, (side * max_side + longest // 2) // longest) for side in (width, height))  # type: ignore[return-value]


def average(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Reduces uint8 (H, W, 3) to uint8 (height, width, 3). Neither side may become longer."""
    reduction = Reduction(pixels.shape[0], pixels.shape[1], height, width)
    reduction.add(pixels)
    return reduction.result()


class Reduction:
    """Reduces an image whose rows are added in order, a few at a time.

    Args:
        from_height, from_width: the size of the image.
        height, width: the size to reduce it to. Neither side may be longer.
    """

    def __init__(self, from_height: int, from_width: int, height: int, width: int) -> None:
        self._from, self._to = (from_height, from_width), (height, width)
        self._taps, self._weights = _taps(from_height, height)
        self._rows = np.zeros((height, from_width * 3), np.float32)
        self._rows_added = 0

    def add(self, pixels: np.ndarray) -> None:
        """Adds the next rows, uint8 (n, from_width, 3)."""
        first, last = self._rows_added, self._rows_added + len(pixels)
        values = pixels.reshape(len(pixels), -1)
        begin = int(np.searchsorted(self._taps[-1], first))  # the first output row that these rows are part of
        end = int(np.searchsorted(self._taps[0], last))
        _weigh(values, first, self._taps[:, begin:end], self._weights[:, begin:end], self._rows[begin:end])
        self._rows_added = last

    def result(self) -> np.ndarray:
        """The reduced image, uint8 (height, width, 3), after all rows have been added."""
        assert self._rows_added == self._from[0]
        height, width = self._to
        columns = np.ascontiguousarray(self._rows.reshape(height, -1, 3).transpose(1, 0, 2)).reshape(self._from[1], -1)
        averaged = np.zeros((width, height * 3), np.float32)
        _weigh(columns, 0, *_taps(self._from[1], width), averaged)
        return (averaged.reshape(width, height, 3).transpose(1, 0, 2) + np.float32(0.5)).astype(np.uint8)


def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `length` inputs each of `size` outputs averages.

    Returns:
        the inputs' indices, (n, size), ascending, and their weights, float32 (n, size).
    """
    edges = np.arange(size + 1) * length / size
    starts, ends = edges[:-1], edges[1:]
    first = np.floor(starts).astype(np.intp)
    num_taps = int((np.ceil(ends) - first).max())
    taps = first + np.arange(num_taps)[:, None]
    covered = np.minimum(ends, taps + 1) - np.maximum(starts, taps)
    weights = (np.clip(covered, 0, None) * size / length).astype(np.float32)
    return np.minimum(taps, length - 1), weights


def _weigh(values: np.ndarray, first: int, taps: np.ndarray, weights: np.ndarray, sums: np.ndarray) -> None:
    """Adds inputs times their weights to `sums` (size, n), in the order of the inputs.

    `values` (m, n) are the inputs from number `first` on.
    """
    for begin in range(0, taps.shape[1], 32):  # blocks that fit into the cache are twice as fast as all at once
        block = slice(begin, begin + 32)
        for tap, weight in zip(taps[:, block] - first, weights[:, block], strict=True):
            here = (tap >= 0) & (tap < len(values)) & (weight > 0)
            if here.all():
                sums[block] += values[tap] * weight[:, None]
            elif here.any():
                sums[block][here] += values[tap[here]] * weight[here, None]
