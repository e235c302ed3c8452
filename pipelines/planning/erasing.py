"""Decides which boxes of an image are erased (Zhong et al., 2017; torchvision's RandomErasing)."""

from __future__ import annotations

import numpy as np

from sdpnet.pipelines.planning.crop_boxes import BOX_DRAWS, first_fitting_boxes
from sdpnet.pipelines.planning.draws import uniforms
from sdpnet.pipelines.planning.options import ERASE_MODES, EraseOptions

__all__ = ["ERASE_MODES", "EraseOptions", "draw_erase_boxes"]


def draw_erase_boxes(erase: EraseOptions, key: int, ids: np.ndarray, image_size: int) -> np.ndarray:
    """Draws the box of each sample that is erased.

    Args:
        erase: the probability, and the ranges of the boxes' areas and ratios.
        key: the key of the draws, from `derive_seed`.
        ids: int64 (B,), sample ids.
        image_size: output pixels a side.

    Returns:
        int32 (B, 4), (top, left, height, width) in output pixels; zeros where nothing is erased.
    """
    boxes = np.zeros((len(ids), 4), np.int32)
    erased = np.flatnonzero(uniforms(key, ids, 1, first=BOX_DRAWS)[:, 0] < erase.probability)
    sizes = np.full((len(erased), 2), image_size, np.int64)
    # torchvision's RandomErasing draws height / width, where its RandomResizedCrop draws width / height.
    inverse = (1 / erase.ratio[1], 1 / erase.ratio[0])
    found, _ = first_fitting_boxes(sizes, key, ids[erased], erase.scale, inverse, proper=True)
    boxes[erased] = found
    return boxes
