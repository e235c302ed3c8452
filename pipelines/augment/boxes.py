"""Boxes as masks, and random erasing."""

from __future__ import annotations

import torch

__all__ = ["box_mask", "erase", "erase_with"]


def box_mask(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where each sample's box covers its image: bool (B, 1, height, width) from int boxes (B, 4).

    Boxes are (top, left, height, width) in pixels; one without height or width covers nothing.
    """
    top, left, box_height, box_width = (side.view(-1, 1, 1, 1) for side in boxes.unbind(1))
    rows = torch.arange(height, device=boxes.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + box_height) & (columns >= left) & (columns < left + box_width)


def erase(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Random erasing (Zhong et al., 2017) of normalised images (B, C, H, W): boxes become 0, the mean colour."""
    return images.masked_fill(box_mask(boxes, *images.shape[2:]), 0.0)


def erase_with(images: torch.Tensor, rows: torch.Tensor, boxes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Random erasing of the images `rows` (int64 (N,)) of a batch (B, C, H, W) with other values than 0.

    `boxes` (N, 4) become `values` (N, C, H or 1, W or 1).
    """
    erased = torch.where(box_mask(boxes, *images.shape[2:]), values, images[rows])
    return images.index_copy(0, rows, erased)
