"""GELU of a depthwise convolution in Triton: half of a conv block in one read and, in training, two writes.

Forward writes GELU's derivative beside the result, so that backward reads no pre-activation and no filter twice:

    forward   x -> GELU(convolution), slope
    backward  gradient, slope -> gradient to x; gradient, slope, x -> partial sums -> gradients to weight and bias

Sums are float32 and always in the same order: the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sdpnet.pipelines import triton_support

__all__ = ["depthwise_gelu", "runs_on"]

_LEAST_CAPABILITY = (8, 0)
_BLOCK = 64  # channels of a program of 32 threads: a warp reads 128 bytes of a pixel in half precision
_TILE = 16  # most rows and most columns of a tile
_PROGRAMS = 2048  # at most, for the weights' gradient: each has KERNEL * KERNEL + 1 partial sums of its channels


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run there: NVIDIA GPUs of compute capability 8.0 or more, if Triton can be imported."""
    return triton_support.runs_on(device, _LEAST_CAPABILITY, _kernels)


@functools.cache
def _kernels() -> Any:
    """The module of the kernels, or None without Triton."""
    modules = triton_support.import_kernels("sdpnet.model.depthwise_kernel")
    return None if modules is None else modules[0]


def depthwise_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU (exact, not tanh) of a depthwise convolution with stride 1 and as many zeros around as keep the size.

    Args:
        x: float32, float16 or bfloat16 (B, dim, H, W); channels_last, or it is copied. Under autocast it is cast.
        weight: (dim, 1, k, k), k odd. It and `bias` are used, and get their gradients, in their own precision.
        bias: (dim,).

    Returns:
        (B, dim, H, W) in x's dtype, channels_last.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    return _forward(x, weight, bias, training)[0]


@torch.library.custom_op("sdpnet::depthwise_gelu", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, training: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and GELU's derivative of the same shape and dtype; empty where not `training`."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    slope = torch.empty_like(out) if training else x.new_empty(0)
    _convolve(x, slope, weight, bias, out, slope, backward=False, write_slope=training)
    return out, slope


@_forward.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, torch.empty_like(out) if training else x.new_empty(0)


@torch.library.custom_op("sdpnet::depthwise_gelu_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor, slope: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients to x (x's dtype, channels_last), weight (its shape and dtype) and bias (weight's dtype)."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    _convolve(gradient, slope, weight, weight, of_x, of_x, backward=True, write_slope=False)
    batch, dim, height, width = x.shape
    taps, tiling = weight[0].numel(), _tiling(x, weight)
    places = batch * -(-height // tiling["ROWS"]) * -(-width // tiling["TILE"])
    blocks = -(-dim // tiling["BLOCK"])
    places_each = -(-places * blocks // _PROGRAMS)
    programs = -(-places // places_each)
    partial = torch.empty((programs, taps + 1, dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _kernels().weight_gradient_kernel[(blocks * programs,)](
            gradient, slope, x, partial, height, width, places, places_each, **tiling
        )
    sums = partial.sum(dim=0)
    of_weight = torch.empty_like(weight)  # with its strides, which DDP's buckets have
    of_weight.copy_(sums[:taps].t().reshape(weight.shape))
    return of_x, of_weight, sums[taps].to(weight.dtype, copy=True)


@_backward.register_fake
def _(
    gradient: torch.Tensor, slope: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    return of_x, torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros as the slope's gradient


def _differentiate(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    x, weight, slope = ctx.saved_tensors
    of_x, of_weight, of_bias = _backward(gradient, slope, x, weight)
    return of_x, of_weight, of_bias.to(ctx.bias_dtype), None


_forward.register_autograd(_differentiate, setup_context=_save)


def _tiling(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """The kernels' constants and options: the fewest tiles of at most `_TILE` a side, and as equal as possible."""
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
    write_slope: bool,
) -> None:
    batch, dim, height, width = x.shape
    tiling = _tiling(x, weight)
    places = batch * -(-height // tiling["ROWS"]) * -(-width // tiling["TILE"])
    taps_first = weight.reshape(dim, -1).t().contiguous()
    with torch.cuda.device_of(x):
        _kernels().convolve_kernel[(-(-dim // tiling["BLOCK"]) * places,)](
            x, factor, taps_first, bias, out, slope, height, width, BACKWARD=backward, SLOPE=write_slope, **tiling
        )
