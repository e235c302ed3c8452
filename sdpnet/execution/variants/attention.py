"""The choice between PyTorch's attention and ours: on a GPU, the attention of one transformer block is timed with both.

What is timed begins with the product for queries, keys and values and ends with the projection, because the two differ
in the copies between them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.variants.choice import Pass, Variants, choose
from sdpnet.model.kernels.attention import runs_on, takes
from sdpnet.model.positions import rotary_embedding
from sdpnet.model.sdpnet import ModelOptions, SdPNet, TransformerBlock
from sdpnet.pipelines.errors import UserError

__all__ = ["attention_variants", "choose_attention"]

_MOST_IMAGES = 256  # with more images, the time is proportional to their number


def choose_attention(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Sets `triton` of the transformer blocks as `train.attention` says. Every process must call it.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: the kernel is asked for where it cannot run.
    """
    compiled = options.compile is True
    images = min(batch_size, _MOST_IMAGES)
    variants = attention_variants(model.options, images, image_size, dtype, processes.device, compiled=compiled)
    chosen, notes = choose(variants, options.attention, processes)
    if compiled and notes:
        # What torch.compile has recorded about this batch size must not affect the training model.
        torch._dynamo.reset()
    for block in model.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        block.triton = chosen == "triton"
    return notes


def attention_variants(
    options: ModelOptions, images: int, image_size: int, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Variants:
    """The variants for a model of this shape.

    Args:
        options: the shape of the model.
        images: the number of images in a pass.
        image_size: pixels a side.
        dtype: the dtype of autocast, or float32 for none.
        device: where the passes run.
        compiled: whether they are compiled.
    """
    side, width = image_size // options.patch_size, options.dim // options.heads
    shape = (images, 1 + options.registers + side**2, options.dim)
    words = [str(dtype), str(shape), f"{options.heads} heads", options.position, *(["compiled"] if compiled else [])]

    def make(*, triton: bool) -> Pass:
        if triton and not runs_on(device):
            raise UserError("needs Triton and an NVIDIA GPU of compute capability 8.0 or more; use auto or torch")
        if triton and not takes(shape[1], width, dtype):
            at_most = "bf16 or fp16, at most 256 tokens, and heads whose width is a multiple of 8 and at most 64"
            raise UserError(
                f"needs {at_most}, not {dtype}, {shape[1]} tokens and a width of {width}; use auto or torch"
            )
        rotary = None
        if options.position == "rope":
            rotary = rotary_embedding((side, side), 1 + options.registers, width, device, torch.float32)
        return _prepare(options, shape, dtype, device, rotary, triton=triton, compiled=compiled)

    return Variants(
        "train.attention",
        ", ".join(words),
        {"torch": functools.partial(make, triton=False), "triton": functools.partial(make, triton=True)},
    )


class _Attention(nn.Module):
    """A transformer block's attention, which is a method, as a module of its own."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        return self.block.attention(x, rotary)


def _prepare(
    options: ModelOptions,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    rotary: torch.Tensor | None,
    *,
    triton: bool,
    compiled: bool,
) -> Pass:
    torch.manual_seed(0)
    block = TransformerBlock(options, 0.0).to(device)
    block.triton = triton
    part = _Attention(block)
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(shape, device=device, dtype=dtype)
    parameters = [*block.qkv.parameters(), *block.proj.parameters()]
    if compiled:
        compile_blocks([part])

    def run() -> Sequence[torch.Tensor]:
        part.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = part(x, rotary)
        out.backward(gradient)
        # The gradients of the parameters are float32 under autocast, but no more exact than `dtype`.
        return [out.detach(), *(value.grad.to(dtype) for value in (x, *parameters) if value.grad is not None)]

    return run
