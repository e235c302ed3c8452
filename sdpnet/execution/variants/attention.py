"""The choice between PyTorch's attention and ours: on a GPU, both are timed once, forward and backward.

What is timed begins with the packed queries, keys and values and ends with their packed gradient. It contains all in
which the two differ: PyTorch's attention returns three gradients, which one kernel then copies into one tensor, both in
eager code (`stack`, the gradient of `unbind`) and in compiled code, where that copy takes as long. The products around
it and a rotation are the same for both and are left out, so nothing has to be compiled by torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants.choice import NEEDS_TRITON, Pass, Variants, choose, images_of_pass
from sdpnet.model.kernels.attention import attention, runs_on, takes
from sdpnet.model.sdpnet import ModelOptions, SdPNet, TransformerBlock
from sdpnet.pipelines.errors import UserError

__all__ = ["attention_variants", "choose_attention"]


def choose_attention(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Sets `triton` of the transformer blocks as `train.attention` says. Every process must call it.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: the kernel is asked for where it cannot run.
    """
    images = images_of_pass(options, batch_size)
    variants = attention_variants(model.options, images, image_size, dtype, processes.device)
    chosen, notes = choose(variants, options.attention, processes)
    for block in model.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        block.triton = chosen == "triton"
    return notes


def attention_variants(
    options: ModelOptions, images: int, image_size: int, dtype: torch.dtype, device: torch.device
) -> Variants:
    """The variants for a model of this shape.

    Args:
        options: the shape of the model.
        images: the number of images in a pass.
        image_size: pixels a side.
        dtype: the dtype of autocast, or float32 for none.
        device: where the passes run.
    """
    tokens = 1 + options.registers + (image_size // options.patch_size) ** 2
    shape = (images, tokens, 3, options.heads, options.dim // options.heads)

    def make(*, triton: bool) -> Pass:
        if triton and not runs_on(device):
            raise UserError(NEEDS_TRITON)
        if triton and not takes(tokens, shape[-1], dtype):
            at_most = "bf16 or fp16, at most 256 tokens, and heads whose width is a multiple of 8 and at most 64"
            raise UserError(
                f"needs {at_most}, not {dtype}, {tokens} tokens and a width of {shape[-1]}; use auto or torch"
            )
        return _prepare(shape, dtype, device, triton=triton)

    return Variants(
        "train.attention",
        f"{dtype}, {shape}",
        {"torch": functools.partial(make, triton=False), "triton": functools.partial(make, triton=True)},
    )


def _prepare(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, triton: bool) -> Pass:
    """A pass from the packed queries, keys and values to the result, and from its gradient to their packed gradient."""
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_()
    gradient = torch.randn(*shape[:2], shape[3] * shape[4], device=device, dtype=dtype, generator=generator)

    def run() -> Sequence[torch.Tensor]:
        if triton:
            out = attention(qkv)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return [out.detach(), *torch.autograd.grad(out, qkv, gradient)]

    return run
