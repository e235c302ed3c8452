"""dropout(GELU(hidden + bias)) in Triton: what lies between the two matrix products of a feed-forward part.

    forward   hidden, bias, keys -> result
    backward  gradient, hidden, bias, keys -> gradient to hidden, partial sums of it -> gradient to bias

Each is one pass over memory. PyTorch's compiler reads the gradient to `hidden` a second time for the bias. All sums are
float32 and in a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from sdpnet.pipelines import triton_support

__all__ = ["gelu_dropout", "runs_on"]

_LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Shape:
    """How a kernel goes over the hidden layer.

    Attributes:
        rows: the rows that a program loads at once.
        block: the maximum number of columns in a program.
        warps: the warps of a program with that many columns.
    """

    rows: int = 2
    block: int = 1024
    warps: int = 4


@dataclass(frozen=True)
class BackwardShape(Shape):
    """How the kernel of the backward pass goes over the hidden layer.

    Attributes:
        programs: about the number of programs; each has neighbouring rows.
    """

    programs: int = 4224


# The fastest ones on an H200 (records/LOG.md). Each program of the forward pass has one tile.
_FORWARD = Shape()
_BACKWARD = BackwardShape()


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on `device`: an NVIDIA GPU of compute capability 8.0 or more, with Triton installed."""
    return triton_support.runs_on(device, _LEAST_CAPABILITY, _kernels)


@functools.cache
def _kernels() -> Any:
    """The module with the kernels, or None if Triton cannot be imported."""
    modules = triton_support.import_kernels("sdpnet.model.kernels.feed_forward_kernel")
    return None if modules is None else modules[0]


def gelu_dropout(
    hidden: torch.Tensor,
    bias: torch.Tensor,
    row_keys: torch.Tensor | None = None,
    column_keys: torch.Tensor | None = None,
    threshold: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    """dropout(GELU(hidden + bias)) with the exact GELU.

    Args:
        hidden: float32, float16 or bfloat16 (..., width).
        bias: (width,). It keeps its dtype under autocast, and so does its gradient.
        row_keys: int32 (rows,), the keys of `sdpnet.model.dropout`; None is without dropout.
        column_keys: int32 (width,), or None.
        threshold: the hash below which an element is dropped.
        scale: the factor of all other elements.

    Returns:
        (..., width) in the dtype of `hidden`.
    """
    if row_keys is None or column_keys is None:
        row_keys = column_keys = bias.new_empty(0, dtype=torch.int32)
    return _forward(hidden, bias, row_keys, column_keys, threshold, scale)


@torch.library.custom_op("sdpnet::gelu_dropout", mutates_args=())
def _forward(
    hidden: torch.Tensor,
    bias: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    threshold: int,
    scale: float,
) -> torch.Tensor:
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    constants = _constants(_FORWARD, hidden, row_keys)
    num_rows, blocks = hidden.shape[:-1].numel(), -(-hidden.shape[-1] // constants["BLOCK"])
    if num_rows:
        with torch.cuda.device_of(hidden):
            _kernels().gelu_dropout_kernel[(blocks * -(-num_rows // constants["ROWS"]),)](
                hidden, bias, row_keys, column_keys, out, num_rows, threshold, scale, **constants
            )
    return out


@_forward.register_fake
def _(
    hidden: torch.Tensor,
    bias: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    threshold: int,
    scale: float,
) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op("sdpnet::gelu_dropout_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    threshold: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients to `hidden` (in its dtype) and to `bias` (in its dtype)."""
    gradient, hidden = gradient.contiguous(), hidden.contiguous()
    out = torch.empty_like(hidden)
    num_rows, width = hidden.shape[:-1].numel(), hidden.shape[-1]
    if not num_rows:
        return out, torch.zeros_like(bias)
    constants = _constants(_BACKWARD, hidden, row_keys)
    blocks = -(-width // constants["BLOCK"])
    part_rows = -(-num_rows // min(-(-num_rows // _BACKWARD.rows), max(1, _BACKWARD.programs // blocks)))
    num_parts = -(-num_rows // part_rows)
    # The sums of the programs are added afterwards. The order of atomic additions would change from run to run.
    partial = torch.empty((num_parts, width), dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _kernels().gelu_dropout_backward_kernel[(blocks * num_parts,)](
            gradient,
            hidden,
            bias,
            row_keys,
            column_keys,
            out,
            partial,
            num_rows,
            part_rows,
            threshold,
            scale,
            math.log2(scale),
            **constants,
        )
    return out, partial.sum(dim=0).to(bias.dtype)


@_backward.register_fake
def _(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    bias: torch.Tensor,
    row_keys: torch.Tensor,
    column_keys: torch.Tensor,
    threshold: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]


def _differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_hidden, grad_bias = _backward(gradient, *ctx.saved_tensors, *ctx.numbers)
    return grad_hidden, grad_bias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _constants(shape: Shape, hidden: torch.Tensor, row_keys: torch.Tensor) -> dict[str, Any]:
    """The kernels' constants and options.

    A block is as wide as possible among the powers of two that divide the width: in half precision, each of 32 threads
    a warp then has 8 columns. Where such a block would be narrower than a warp, the last block is not full.
    """
    width = hidden.shape[-1]
    dividing = min(width & -width, shape.block)
    even = dividing >= 256
    block = dividing if even else 256
    return {
        "WIDTH": width,
        "DROPS": row_keys.numel() > 0,
        "EVEN": even,
        "ROWS": shape.rows,
        "BLOCK": block,
        "num_warps": max(1, shape.warps * block // shape.block),
    }
