"""The feed-forward part of a transformer block: Linear, GELU, dropout, Linear, dropout; in PyTorch or our kernels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from sdpnet.model.dropout import Dropout, draw_keys, split_keys, threshold
from sdpnet.model.kernels.feed_forward import gelu_dropout

__all__ = ["FeedForward", "Variant"]

Variant = Literal["torch", "triton"]


class FeedForward(nn.Sequential):
    """Linear (dim -> hidden), exact GELU, dropout, Linear (hidden -> dim), dropout: (..., dim) -> the same shape.

    Attributes:
        variant: how training computes it. `torch`: by PyTorch's operations, as evaluation always does. `triton`: bias,
            GELU and dropout are one kernel of ours.
    """

    variant: Variant = "torch"

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, dim), Dropout(dropout))

    def layers(self) -> tuple[nn.Linear, Dropout, nn.Linear, Dropout]:
        """The first Linear, the dropout after GELU, the second Linear and the dropout after it."""
        up, _, inner, down, outer = self
        assert isinstance(up, nn.Linear) and isinstance(inner, Dropout)
        assert isinstance(down, nn.Linear) and isinstance(outer, Dropout)
        return up, inner, down, outer

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the feed-forward part.

        Args:
            x: (..., dim).
            keys: int32 (2, at least rows + hidden), of `draw_keys`: a row for each dropout. With None, dropout draws
                its own keys.
        """
        up, inner, down, outer = self.layers()
        if not self.training:
            return down(F.gelu(up(x)))
        rows, hidden = x.shape[:-1].numel(), up.out_features
        first = second = None
        if inner.p > 0:
            first, second = keys if keys is not None else draw_keys(1, rows, hidden, x.device)[0]
        if self.variant == "triton" and type(up) is nn.Linear:  # a float8 layer computes the product with the bias
            mask = (
                (*split_keys(first, rows, hidden), threshold(inner.p), 1 / (1 - inner.p)) if first is not None else ()
            )
            active = gelu_dropout(F.linear(x, up.weight), up.bias, *mask)
        else:
            active = inner(F.gelu(up(x)), first)
        return outer(down(active), second)
