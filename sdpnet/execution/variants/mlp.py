"""The ways to compute bias, GELU and dropout in a transformer block's feed-forward part: PyTorch's, and our kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.variants.choice import NEEDS_TRITON, Pass, Variants, choose, images_of_pass
from sdpnet.model.dropout import draw_keys, hash_dropout, split_keys, threshold
from sdpnet.model.kernels.feed_forward import gelu_dropout, runs_on
from sdpnet.model.sdpnet import ModelOptions, SdPNet, TransformerBlock
from sdpnet.pipelines.errors import UserError

__all__ = ["choose_mlp", "mlp_variants"]


def choose_mlp(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Sets `mlp.variant` of the transformer blocks as `train.mlp` says. Every process must call it.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: the variant that is asked for cannot run here.
    """
    images = images_of_pass(options, batch_size)
    compiled = options.compile is True
    variants = mlp_variants(model.options, images, image_size, dtype, processes.device, compiled=compiled)
    name, notes = choose(variants, options.mlp, processes)
    for block in model.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        block.mlp.variant = name  # type: ignore[assignment]
    return notes


def mlp_variants(
    options: ModelOptions, images: int, image_size: int, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Variants:
    """The variants for the hidden layer of `images` images, with the model's dropout, forward and backward.

    The two matrix products are the same in all variants, so they are not part of a pass. PyTorch's pass begins with the
    bias added, because the first product does so in passing.

    Args:
        options: the shape of the model.
        images: the number of images in a pass.
        image_size: pixels a side.
        dtype: the dtype of the products' results. The bias is float32.
        device: where they run.
        compiled: whether PyTorch's operations are compiled. Our kernel is the same in compiled code.
    """
    rows = images * (1 + options.registers + (image_size // options.patch_size) ** 2)
    width, rate = options.dim * options.mlp_ratio, options.dropout
    made = functools.cache(lambda: _inputs(rows, width, dtype, device))

    def ours() -> Pass:
        if not runs_on(device):
            raise UserError(NEEDS_TRITON)
        hidden, bias, gradient, keys = made()
        mask = (*split_keys(keys, rows, width), threshold(rate), 1 / (1 - rate)) if rate else ()
        return _as_pass(lambda h, b: gelu_dropout(h, b, *mask), hidden, bias, gradient)

    def pytorchs() -> Pass:
        hidden, bias, gradient, keys = made()
        part = _Plain(rate)
        if compiled:
            compile_blocks([part])
        return _as_pass(lambda h, b: part(h, b, keys), (hidden + bias).to(dtype), bias, gradient)

    what = f"{dtype}, GELU of ({rows}, {width}), dropout {rate:g}{', compiled' if compiled else ''}"
    return Variants("train.mlp", what, {"torch": pytorchs, "triton": ours})


def _inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The first product's result without the bias, the bias, the gradient to the active layer, and keys of dropout."""
    hidden, gradient = torch.randn(2, rows, width, device=device, dtype=dtype)
    keys = draw_keys(1, rows, width, device)[0, 0]
    return hidden, torch.randn(width, device=device) * 0.1, gradient, keys


class _Biased(torch.autograd.Function):
    """hidden, which already has the bias -> hidden. The bias has its gradient, as in the matrix product."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], gradients[0].sum(0).float()


class _Plain(nn.Module):
    """What `FeedForward` computes between its matrix products with PyTorch's operations."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        active = F.gelu(_Biased.apply(hidden, bias))
        return hash_dropout(active, keys, self.rate) if self.rate else active


def _as_pass(part: Any, hidden: torch.Tensor, bias: torch.Tensor, gradient: torch.Tensor) -> Pass:
    inputs = hidden.detach().requires_grad_(), bias.detach().requires_grad_()

    def one_pass() -> Sequence[torch.Tensor]:
        out = part(*inputs)
        found = torch.autograd.grad(out, inputs, gradient)
        # In the dtype of the products, because that says how far results may differ by rounding.
        return [out.detach(), *(tensor.to(hidden.dtype) for tensor in found)]

    return one_pass
