"""The patch convolution as a copy and one matrix product: the patches do not overlap, so each is a row of a matrix."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["patch_product"]


def patch_product(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A convolution with stride p and kernel p x p, without padding. Autocast applies to it as to the convolution.

    A row of the matrix is in the order of a channels_last image (row, column, channel), so p * channels values that
    follow each other in memory stay together. The rows of the weight are then a view of a channels_last weight.

    Args:
        images: (B, channels, H, W), channels_last for a fast copy. As in the convolution, rows and columns that do not
            fill a patch are ignored.
        weight: (dim, channels, p, p), the convolution's.
        bias: (dim,) or None.

    Returns:
        (B, dim, H // p, W // p), channels_last: a view of the product.
    """
    dim, patch_size = weight.shape[0], weight.shape[2]
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # a view (B, c, h, w, p, p)
    batch, _, rows, columns = patches.shape[:4]
    matrix = patches.permute(0, 2, 3, 4, 5, 1).reshape(batch * rows * columns, -1)
    out = F.linear(matrix, weight.permute(0, 2, 3, 1).reshape(dim, -1), bias)
    return out.view(batch, rows, columns, dim).permute(0, 3, 1, 2)
