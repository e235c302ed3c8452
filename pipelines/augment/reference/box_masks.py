"""Makes masks of boxes, and erases boxes at random."""

from __future__ import annotations

import torch

__all__ = ["box_mask", "erase", "erase_with", "outside_boxes"]


def _sides(boxes: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows (B, 1, height, 1) and which columns (B, 1, 1, width) the boxes cover, bool."""
    top, left, box_height, box_width = (side.view(-1, 1, 1, 1) for side in boxes.unbind(1))
    rows = torch.arange(height, device=boxes.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + box_height), (columns >= left) & (columns < left + box_width)


def box_mask(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks of boxes: bool (B, 1, height, width), True where a sample's box covers its image.

    Args:
        boxes: int (B, 4), (top, left, height, width) in pixels. A box of height or width 0 covers nothing.
        height, width: the images' size.
    """
    rows, columns = _sides(boxes, height, width)
    return rows & columns


def outside_boxes(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks as float32 (B, 1, height, width): 1 outside a sample's box, 0 inside.

    On a CPU, multiplying by such a mask is faster than masking with bools.
    """
    rows, columns = _sides(boxes, height, width)
    return torch.mul(rows.float(), columns.float()).neg_().add_(1)


def erase(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Erases boxes (Zhong et al., 2017) of normalised images (B, C, H, W): they become 0, the mean colour.

    The images are changed in place and returned.
    """
    return images.mul_(outside_boxes(boxes, *images.shape[2:]))


def erase_with(images: torch.Tensor, rows: torch.Tensor, boxes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Erases boxes of some images with other values than 0. Returns a new batch.

    Args:
        images: float (B, C, H, W).
        rows: int64 (N,), the indices of the images to erase.
        boxes: int (N, 4), (top, left, height, width) in pixels.
        values: float (N, C, H or 1, W or 1), the values that the boxes get.
    """
    erased = torch.where(box_mask(boxes, *images.shape[2:]), values, images[rows])
    return images.index_copy(0, rows, erased)
