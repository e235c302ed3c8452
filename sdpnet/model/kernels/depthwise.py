"""GELU of a depthwise convolution in Triton: the first half of a conv block as one kernel.

    forward   x -> GELU(convolution), slope
    backward  gradient, slope -> gradient to x; gradient, slope, x -> partial sums -> gradients to weight and bias

The forward pass reads x once and, in training, writes two tensors: the result and GELU's derivative (`slope`). Keeping
the derivative instead of the pre-activation takes the same memory, and it saves the backward pass either a pass over
memory or a second convolution (records/LOG.md compares the three). All sums are float32 and in a fixed order, so equal
inputs give equal bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sdpnet.pipelines import triton_support

__all__ = ["compiles_for", "convolve_gelu", "depthwise_gelu", "gradients", "runs_on"]

_LEAST_CAPABILITY = (8, 0)
_LEAST_COMPILED = (7, 0)  # for which Triton 3.6 and 3.8 compile them without spills; never run on such a card
_BLOCK = 64  # channels in a program of 32 threads: a warp then reads 128 bytes of a pixel in half precision
_TILE = 16  # the maximum number of rows and of columns in a tile
_PROGRAMS = 2048  # the maximum for the weights' gradient; each writes KERNEL * KERNEL + 1 partial sums for its channels


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on `device`: an NVIDIA GPU of compute capability 8.0 or more, with Triton installed."""
    return triton_support.runs_on(device, _LEAST_CAPABILITY, _kernels)


@functools.cache
def compiles_for(device: torch.device) -> bool:
    """Whether the kernels can be compiled for `device`: as `runs_on`, but from compute capability 7.0 on."""
    return triton_support.runs_on(device, _LEAST_COMPILED, _kernels)


@functools.cache
def _kernels() -> Any:
    """The module with the kernels, or None if Triton cannot be imported."""
    modules = triton_support.import_kernels("sdpnet.model.kernels.depthwise_kernel")
    return None if modules is None else modules[0]


def depthwise_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU (exact, not tanh) of a depthwise convolution with stride 1 and zero padding that keeps the size.

    Args:
        x: float32, float16 or bfloat16 (B, dim, H, W). It is copied unless it is channels_last. Autocast applies to it.
        weight: (dim, 1, k, k) with k odd. Weight and bias keep their dtype under autocast, and so do their gradients.
        bias: (dim,).

    Returns:
        (B, dim, H, W) in the dtype of x, channels_last.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    return _forward(x, weight, bias, training)[0]


@torch.library.custom_op("sdpnet::depthwise_gelu", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return convolve_gelu(x, weight, bias, training)


@_forward.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, torch.empty_like(out) if training else x.new_empty(0)


@torch.library.custom_op("sdpnet::depthwise_gelu_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor, slope: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gradients(gradient, slope, x, weight)


@_backward.register_fake
def _(
    gradient: torch.Tensor, slope: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    return grad_x, torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise torch would allocate zeros as the gradient of the slope


def _differentiate(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    x, weight, slope = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _backward(gradient, slope, x, weight)
    return grad_x, grad_weight, grad_bias.to(ctx.bias_dtype), None


_forward.register_autograd(_differentiate, setup_context=_save)


def convolve_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and GELU's derivative in the same shape and dtype. Without `training` the latter is empty."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    slope = torch.empty_like(out) if training else x.new_empty(0)
    _convolve(x, slope, weight, bias, out, slope, backward=False, with_slope=training)
    return out, slope


def gradients(
    gradient: torch.Tensor,
    slope: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients to x (in its dtype, channels_last), to weight (in its shape and dtype) and to bias (as weight)."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    _convolve(gradient, slope, weight, weight, grad_x, grad_x, backward=True, with_slope=False)
    batch, dim, height, width = x.shape
    taps, tiling = weight[0].numel(), _tiling(x, weight)
    num_tiles = batch * -(-height // tiling["ROWS"]) * -(-width // tiling["TILE"])
    blocks = -(-dim // tiling["BLOCK"])
    tiles_per_program = -(-num_tiles * blocks // _PROGRAMS)
    programs = -(-num_tiles // tiles_per_program)
    # Each program writes its own sums, which are added afterwards. Atomic additions would need no second sum, but their
    # order changes from run to run, and with it the last bits of the gradients.
    partial = torch.empty((programs, taps + 1, dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _kernels().weight_gradient_kernel[(blocks * programs,)](
            gradient, slope, x, partial, height, width, num_tiles, tiles_per_program, **tiling
        )
    sums = partial.sum(dim=0)
    grad_weight = torch.empty_like(weight)  # has the strides of the weight, as DDP's buckets have
    grad_weight.copy_(sums[:taps].t().reshape(weight.shape))
    return grad_x, grad_weight, sums[taps].to(weight.dtype, copy=True)


def _tiling(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """The kernels' constants and options, for as few tiles as possible of at most `_TILE` pixels a side.

    Tiles are made equally large, as far as possible, because a program computes a full tile even if a part of it lies
    outside of the image.
    """
    height, width = x.shape[2:]
    tile = -(-width // -(-width // _TILE))
    return {
        "DIM": x.shape[1],
        "KERNEL": weight.shape[-1],
        "TILE": tile,
        "ROWS": -(-height // -(-height // _TILE)),
        "WHOLE": tile == width,
        "BLOCK": _BLOCK,
        "num_warps": 1,
        "enable_fp_fusion": True,
    }


def _convolve(
    x: torch.Tensor,
    factor: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    slope: torch.Tensor,
    *,
    backward: bool,
    with_slope: bool,
) -> None:
    batch, dim, height, width = x.shape
    tiling = _tiling(x, weight)
    num_tiles = batch * -(-height // tiling["ROWS"]) * -(-width // tiling["TILE"])
    taps_first = weight.reshape(dim, -1).t().contiguous()
    with torch.cuda.device_of(x):
        _kernels().convolve_kernel[(-(-dim // tiling["BLOCK"]) * num_tiles,)](
            x, factor, taps_first, bias, out, slope, height, width, BACKWARD=backward, SLOPE=with_slope, **tiling
        )
