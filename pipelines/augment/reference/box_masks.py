"""Boxes as masks, and random erasing."""

from __future__ import annotations

import torch

__all__ = ["box_mask", "erase", "erase_with", "outside_boxes"]


def _sides(boxes: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows (B, 1, height, 1) and columns (B, 1, 1, width) of boxes, bool."""
    top, left, box_height, box_width = (side.view(-1, 1, 1, 1) for side in boxes.unbind(1))
    rows = torch.arange(height, device=boxes.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + box_height), (columns >= left) & (columns < left + box_width)


def box_mask(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Where each sample's box covers its image: bool (B, 1, height, width) from int boxes (B, 4).

    Boxes are (top, left, height, width) in pixels; one without height or width covers nothing.
    """
    rows, columns = _sides(boxes, height, width)
    return rows & columns


def outside_boxes(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """float32 (B, 1, height, width): 1 outside a sample's box, 0 inside. On a CPU floats are masked faster by a product
    than by bools."""
    rows, columns = _sides(boxes, height, width)
    return torch.mul(rows.float(), columns.float()).neg_().add_(1)


def erase(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Random erasing (Zhong et al., 2017) of normalised images (B, C, H, W): boxes become 0, the mean colour.

    The images themselves are written to and returned.
    """
    return images.mul_(outside_boxes(boxes, *images.shape[2:]))


def erase_with(images: torch.Tensor, rows: torch.Tensor, boxes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Random erasing of the images `rows` (int64 (N,)) of a batch (B, C, H, W) with other values than 0.

    `boxes` (N, 4) become `values` (N, C, H or 1, W or 1).
    """
    erased = torch.where(box_mask(boxes, *images.shape[2:]), values, images[rows])
    return images.index_copy(0, rows, erased)
