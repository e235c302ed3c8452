"""Decides the crop box of each image: a random resized crop for training, the centre for evaluation."""

from __future__ import annotations

from typing import Final

import numpy as np

from sdpnet.pipelines.planning.draws import uniforms
from sdpnet.pipelines.planning.options import CropOptions

__all__ = ["BOX_DRAWS", "CropOptions", "centre_crops", "first_fitting_boxes", "random_resized_crops"]

_TRIES: Final = 10  # the number of random boxes tried per image, as in torchvision
BOX_DRAWS: Final = 4 * _TRIES  # the number of uniforms that `first_fitting_boxes` may use per sample


def random_resized_crops(sizes: np.ndarray, key: int, ids: np.ndarray, crop: CropOptions) -> np.ndarray:
    """Draws the boxes of torchvision's RandomResizedCrop for all samples at once.

    If none of 10 boxes fits into an image, the largest central box within `crop.ratio` is taken.

    Args:
        sizes: int64 (B, 2), the height and width of each image in pixels.
        key: the key of the draws, from `derive_seed`.
        ids: int64 (B,), sample ids.
        crop: the ranges of the boxes' areas and ratios.

    Returns:
        int32 (B, 4), (top, left, height, width) in pixels.
    """
    boxes, found = first_fitting_boxes(sizes, key, ids, crop.scale, crop.ratio, proper=False)
    missed = np.flatnonzero(~found)
    if len(missed):
        height, width = sizes[missed, 0], sizes[missed, 1]
        box_h = np.clip(np.rint(width / crop.ratio[0]).astype(np.int64), 1, height)
        box_w = np.clip(np.rint(height * crop.ratio[1]).astype(np.int64), 1, width)
        boxes[missed] = np.stack([(height - box_h) // 2, (width - box_w) // 2, box_h, box_w], axis=1)
    return boxes.astype(np.int32)


def centre_crops(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """The central squares whose side is `fraction` of the shorter side.

    Args:
        sizes: int64 (B, 2), the height and width of each image in pixels.
        fraction: the share of the shorter side, in (0, 1].

    Returns:
        int32 (B, 4), (top, left, height, width) in pixels.
    """
    side = np.maximum(1, np.rint(sizes.min(axis=1) * fraction).astype(np.int64))
    return np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], axis=1).astype(np.int32)


def first_fitting_boxes(
    sizes: np.ndarray,
    key: int,
    ids: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    proper: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws up to 10 random boxes per image and takes the first one that fits.

    The area is uniform in `scale`, log(width / height) is uniform in log(`ratio`), and the position is uniform, as in
    torchvision's `RandomResizedCrop.get_params` and `RandomErasing.get_params`.

    Args:
        sizes: int64 (B, 2), the height and width of each image in pixels.
        key: the key of the draws, from `derive_seed`.
        ids: int64 (B,), sample ids.
        scale: the range of the box's share of the image's area.
        ratio: the range of width / height.
        proper: whether a box must be smaller than the image on both sides, as in `RandomErasing`.

    Returns:
        boxes int64 (B, 4), (top, left, height, width), zeros where no box fits, and whether one fits, bool (B,).
    """
    boxes = np.zeros((len(ids), 4), np.int64)
    pending = np.arange(len(ids))
    log_low, log_high = np.log(ratio)
    # Most first boxes fit, so only the first one is drawn for all samples; for the others, all further tries are drawn
    # at once. Counters make the draws the same as one by one.
    for start, stop in ((0, 1), (1, _TRIES)):
        count = stop - start
        u = uniforms(key, ids[pending], 4 * count, first=4 * start).reshape(-1, count, 4)
        height, width = sizes[pending, :1], sizes[pending, 1:]
        area = height * width * (scale[0] + u[..., 0] * (scale[1] - scale[0]))
        aspect = np.exp(log_low + u[..., 1] * (log_high - log_low))
        box_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        box_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        fits = (box_h > 0) & (box_w > 0) & (box_h <= height - proper) & (box_w <= width - proper)
        fitting = fits.any(axis=1)
        some = np.flatnonzero(fitting)
        first = fits[some].argmax(axis=1)
        box_h, box_w, u = box_h[some, first], box_w[some, first], u[some, first]
        found = pending[some]
        boxes[found, 0] = u[:, 2] * (sizes[found, 0] - box_h + 1)
        boxes[found, 1] = u[:, 3] * (sizes[found, 1] - box_w + 1)
        boxes[found, 2], boxes[found, 3] = box_h, box_w
        pending = pending[~fitting]
        if not len(pending):
            break
    return boxes, boxes[:, 2] > 0
