"""Dropout whose mask is a hash of the element's row and column. The backward pass computes it again; none is kept.

    keys = draw_keys(layers, rows, width, device)     once for a forward pass of the model
    y = hash_dropout(x, keys[layer, place], rate)     x (..., width) with `rows` rows

Each row and each column has a random key of 32 bits, drawn from torch's generator. An element is dropped if a hash of
its two keys is below the rate. The keys of a block take about 0.5 MB where a mask of the hidden layer of sdpnet_xl at a
batch of 256 takes 158 MB. Eager code on CPUs, compiled code and our Triton kernel compute the same masks from the
same keys.

The hash is lowbias32 without its first and last shift (C. Wellons, "Prospecting for Hash Functions", 2018). The first
shift only exchanges the keys for other random keys, and the last one changes bits that decide nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["FACTORS", "SHIFT", "Dropout", "draw_keys", "dropped", "hash_dropout", "split_keys", "threshold"]

# The second factor is 0x846CA68B as a signed number. Triton kernels have these numbers as well.
FACTORS = (0x7FEB352D, 0x846CA68B - (1 << 32))
SHIFT = 15


def draw_keys(layers: int, rows: int, width: int, device: torch.device) -> torch.Tensor:
    """Draws keys for two dropouts in each of some layers from torch's generator of `device`.

    Args:
        layers: the number of layers.
        rows: the number of rows of the inputs, such as images times tokens.
        width: the largest width of an input.

    Returns:
        int32 (layers, 2, at least rows + width), uniform over all integers of 32 bits.
    """
    length = (rows + width + 3) // 4 * 4  # so that the keys of each dropout begin at a multiple of 16 bytes
    return torch.randint(-(1 << 31), 1 << 31, (layers, 2, length), dtype=torch.int32, device=device)


def split_keys(keys: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of the rows (rows,) and of the columns (width,) of one dropout."""
    return keys[:rows], keys[len(keys) - width :]


def threshold(rate: float) -> int:
    """The hash, a signed integer of 32 bits, below which an element is dropped with probability `rate` in [0, 1)."""
    return min(round(rate * (1 << 32)), (1 << 32) - 1) - (1 << 31)


def _multiply(value: torch.Tensor, factor: int) -> torch.Tensor:
    """The lower 32 bits of a product of integers of 32 bits."""
    if torch.compiler.is_compiling():
        # Compiled for a CPU, a product of int32 that overflows would be undefined behaviour of C++; this one fits into
        # 63 bits. On a GPU it becomes a multiplication of 32 bits.
        return (value.long() * factor).int()
    return value * factor


def dropped(rows: torch.Tensor, columns: torch.Tensor, rate: float) -> torch.Tensor:
    """The elements to drop, bool (*rows.shape, *columns.shape), from the int32 keys of `split_keys`."""
    value = _multiply(rows.unsqueeze(-1) ^ columns, FACTORS[0])
    value = value ^ ((value >> SHIFT) & ((1 << (32 - SHIFT)) - 1))  # the shift without copies of the sign
    return _multiply(value, FACTORS[1]) < threshold(rate)


def _apply(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, rate: float) -> torch.Tensor:
    return (x * (1 / (1 - rate))).masked_fill(dropped(rows, columns, rate), 0.0)


class _HashDropout(torch.autograd.Function):
    """Keeps the keys for the backward pass, where plain operations would keep the mask."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, rate: float) -> torch.Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.rate = rate
        return _apply(x, rows, columns, rate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _HashDropout.apply(gradients[0], *ctx.saved_tensors, ctx.rate), None, None, None


def hash_dropout(x: torch.Tensor, keys: torch.Tensor, rate: float) -> torch.Tensor:
    """Sets elements to 0 with probability `rate` in (0, 1) and divides the others by 1 - rate.

    Args:
        x: (..., width), of any floating-point dtype.
        keys: int32 (at least rows + width,), one row of the result of `draw_keys`.
    """
    rows, columns = split_keys(keys, x.shape[:-1].numel(), x.shape[-1])
    rows = rows.view(x.shape[:-1])
    if torch.compiler.is_compiling():  # the compiler itself computes in the backward pass what is cheap
        return _apply(x, rows, columns, rate)
    return _HashDropout.apply(x, rows, columns, rate)


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws by `hash_dropout`; with `keys` None, it draws keys of its own.

    Code that is not compiled for a GPU draws as `nn.Dropout` does: there the hash would take seven passes over memory
    instead of one.
    """

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.is_cuda and not torch.compiler.is_compiling():
            return super().forward(x)
        if keys is None:
            keys = draw_keys(1, x.shape[:-1].numel(), x.shape[-1], x.device)[0, 0]
        return hash_dropout(x, keys, self.p)
