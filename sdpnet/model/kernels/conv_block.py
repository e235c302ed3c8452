"""A conv block in training as one operation: Triton kernels for all but its products, which are PyTorch's.

    y = GELU(depthwise(x));  z = x + factor * BN1(y);  h = z W + b;  out = BN2(GELU(h))

Batch normalisation reads its input once for the statistics and once to normalise it. The residual sum, the factor of
stochastic depth and GELU are computed where their operands are loaded. Kept for the backward pass are x, y, GELU's
derivative of the depthwise convolution, z, h and the statistics; GELU(h) is computed again.

All sums are float32 and in a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from sdpnet.model.kernels import batch_norm, depthwise

__all__ = ["fused_conv_block", "takes"]

_Tensors = tuple[torch.Tensor, ...]


def takes(x: torch.Tensor, norm1: nn.Module, norm2: nn.Module) -> bool:
    """Whether `fused_conv_block` computes what the modules do: a training step whose batch norms are PyTorch's own.

    Synchronized batch norms wait for other processes in the middle of the block, and are therefore not taken. With one
    value for each channel there is no variance, which PyTorch's batch norm reports.
    """
    norms_are_plain = type(norm1) is nn.BatchNorm2d and type(norm2) is nn.BatchNorm2d and norm1.training
    in_training = norms_are_plain and norm2.training and torch.is_grad_enabled()
    halves = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return in_training and halves and x.shape[0] * x.shape[2] * x.shape[3] > 1


def fused_conv_block(
    x: torch.Tensor,
    depthwise: nn.Conv2d,
    norm1: nn.BatchNorm2d,
    factor: torch.Tensor | None,
    pointwise: nn.Conv2d,
    norm2: nn.BatchNorm2d,
) -> torch.Tensor:
    """BN2(GELU(pointwise(x + factor * BN1(GELU(depthwise(x)))))), and moves the running statistics of both norms.

    Args:
        x: float32, float16 or bfloat16 (B, dim, H, W). It is copied unless it is channels_last. Autocast applies to it.
        factor: stochastic depth's factors of the samples, B values of any float dtype; None for ones.
        depthwise, norm1, pointwise, norm2: the block's modules. See `takes`.

    Returns:
        (B, dim, H, W) in the dtype of x, channels_last.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    assert depthwise.bias is not None and pointwise.bias is not None
    out, *_, statistics = _forward(
        x,
        factor,
        depthwise.weight,
        depthwise.bias,
        norm1.weight,
        norm1.bias,
        pointwise.weight,
        pointwise.bias,
        norm2.weight,
        norm2.bias,
        norm1.eps,
        norm2.eps,
    )
    with torch.no_grad():
        count = x.shape[0] * x.shape[2] * x.shape[3]
        for norm, (mean, _, variance) in zip((norm1, norm2), statistics.unbind(), strict=True):
            assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
            # PyTorch's batch norm normalises by the biased variance and keeps the unbiased one.
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    return out


@torch.library.custom_op("sdpnet::conv_block", mutates_args=())
def _forward(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    point_weight: torch.Tensor,
    point_bias: torch.Tensor,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    eps1: float,
    eps2: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result; for the backward pass slope, y, z and h, all as x; and the norms' statistics, float32 (2, 3, dim)."""
    x = x.contiguous(memory_format=torch.channels_last)
    y, slope = depthwise.convolve_gelu(x, weight, bias, True)
    statistics = torch.empty(2, 3, x.shape[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        batch_norm.write_statistics(y, statistics[0], eps1, gelu=False)
        z = batch_norm.normalise(y, x, factor, statistics[0], norm1_weight, norm1_bias, gelu=False)
        square = point_weight.flatten(1).to(x.dtype)
        h = _image(torch.addmm(point_bias.to(x.dtype), _rows(z), square.t()), x)
        batch_norm.write_statistics(h, statistics[1], eps2, gelu=True)
        out = batch_norm.normalise(h, None, None, statistics[1], norm2_weight, norm2_bias, gelu=True)
    return out, slope, y, z, h, statistics


@_forward.register_fake
def _(
    x: torch.Tensor, factor: torch.Tensor | None, weight: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    like = functools.partial(torch.empty_like, x, memory_format=torch.channels_last)
    return like(), like(), like(), like(), like(), x.new_empty((2, 3, x.shape[1]), dtype=torch.float32)


@torch.library.custom_op("sdpnet::conv_block_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    norm1_weight: torch.Tensor,
    point_weight: torch.Tensor,
    norm2_weight: torch.Tensor,
    slope: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    h: torch.Tensor,
    statistics: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients to these, in this order:

    x (in its dtype, channels_last); the depthwise weight and bias (both in the weight's dtype); the first norm's bias
    and weight, together float32 (2, dim); the pointwise weight (in its dtype) and bias (float32); the second norm's
    bias and weight, as the first's.
    """
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device_of(x):
        grad_norm2 = batch_norm.gradient_sums(gradient, h, None, statistics[1], gelu=True)
        grad_h, grad_point_bias = batch_norm.normalise_backward(
            gradient, h, None, statistics[1], norm2_weight, grad_norm2, gelu=True
        )
        grad_z = _image(torch.mm(_rows(grad_h), point_weight.flatten(1).to(x.dtype)), x)
        grad_point_weight = torch.empty_like(point_weight)  # has the strides of the weight, as DDP's buckets have
        grad_point_weight.copy_(torch.mm(_rows(grad_h).t(), _rows(z)).view(point_weight.shape))
        grad_norm1 = batch_norm.gradient_sums(grad_z, y, factor, statistics[0], gelu=False)
        grad_y, _ = batch_norm.normalise_backward(
            grad_z, y, factor, statistics[0], norm1_weight, grad_norm1, gelu=False
        )
    grad_x, grad_weight, grad_bias = depthwise.gradients(grad_y, slope, x, weight)
    # A pass of its own: in the epilogue of the convolution, this sum takes four times as long (records/LOG.md).
    grad_x += grad_z
    return grad_x, grad_weight, grad_bias, grad_norm1, grad_point_weight, grad_point_bias, grad_norm2


@_backward.register_fake
def _(
    gradient: torch.Tensor,
    x: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    norm1_weight: torch.Tensor,
    point_weight: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    new = functools.partial(x.new_empty, dtype=torch.float32)
    dim = x.shape[1]
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad_bias = weight.new_empty(dim)
    pair = new((2, dim))
    return grad_x, torch.empty_like(weight), grad_bias, pair, torch.empty_like(point_weight), new(dim), new((2, dim))


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Tensors) -> None:
    x, factor, weight, bias, norm1_weight, norm1_bias, point_weight, point_bias, norm2_weight, norm2_bias, _, _ = inputs
    ctx.save_for_backward(x, factor, weight, norm1_weight, point_weight, norm2_weight, *output[1:])
    ctx.dtypes = tuple(value.dtype for value in (bias, norm1_weight, norm1_bias, point_bias, norm2_weight, norm2_bias))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise torch would allocate zeros as gradients of what is kept


def _differentiate(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    x, factor, weight, norm1_weight, point_weight, norm2_weight, *kept = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_norm1, grad_point_weight, grad_point_bias, grad_norm2 = _backward(
        gradient, x, factor, weight, norm1_weight, point_weight, norm2_weight, *kept
    )
    vectors = (grad_bias, grad_norm1[1], grad_norm1[0], grad_point_bias, grad_norm2[1], grad_norm2[0])
    bias, scale1, shift1, point_bias, scale2, shift2 = (
        value.to(dtype) for value, dtype in zip(vectors, ctx.dtypes, strict=True)
    )
    return grad_x, None, grad_weight, bias, scale1, shift1, grad_point_weight, point_bias, scale2, shift2, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _rows(image: torch.Tensor) -> torch.Tensor:
    """A channels_last image (B, dim, H, W) as its pixels (B * H * W, dim): a view."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_rows`, for an image of the shape of `like`."""
    batch, dim, height, width = like.shape
    return rows.view(batch, height, width, dim).permute(0, 3, 1, 2)
