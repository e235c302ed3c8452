"""The ways to compute a conv block in training: PyTorch's operations, or the block as one operation in Triton."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.variants.choice import Pass, Variants, choose
from sdpnet.model.kernels.depthwise import runs_on
from sdpnet.model.sdpnet import ConvBlock, SdPNet
from sdpnet.pipelines.errors import UserError

__all__ = ["choose_conv_block", "conv_block_variants"]

_MOST_IMAGES = 256  # with more images, the time is proportional to their number


def conv_block_variants(
    options: TrainOptions,
    model: SdPNet,
    batch_size: int,
    image_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    synchronized: bool = False,
) -> Variants:
    """The variants for the model's shape.

    Args:
        options: `torch` has the depthwise convolution that is set in the blocks of `model`. With `compile`, the blocks
            of both variants are compiled.
        synchronized: whether batch norm sums its statistics over all processes.
    """
    size = image_size // model.options.patch_size
    shape = (min(batch_size, _MOST_IMAGES), model.options.dim, size, size)
    memory_format = torch.contiguous_format if options.memory_format == "contiguous" else torch.channels_last
    triton_depthwise = any(isinstance(block, ConvBlock) and block.triton for block in model.conv_blocks)

    def make(fused: bool) -> Callable[[], Pass]:
        def prepare() -> Pass:
            if fused:
                _require_possible(options, device, synchronized)
            torch.manual_seed(0)
            block = (
                ConvBlock(model.options.dim, model.options.kernel_size, 0.0).to(device).to(memory_format=memory_format)
            )
            block.triton, block.fused = triton_depthwise, fused
            if options.compile is True:
                compile_blocks([block])
            images, upstream = torch.randn(2, *shape, device=device, dtype=dtype)
            x, gradient = (value.contiguous(memory_format=memory_format) for value in (images, upstream))
            x.requires_grad_()

            def one_pass() -> list[torch.Tensor]:
                block.zero_grad(set_to_none=True)
                x.grad = None
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    out = block(x)
                out.backward(gradient)
                # The gradients come from products in `dtype`, so they agree to its precision only.
                return [out, *(p.grad.to(dtype) for p in (x, *block.parameters()) if p.grad is not None)]

            return one_pass

        return prepare

    compiled, ours = ", compiled" if options.compile is True else "", ", triton depthwise" if triton_depthwise else ""
    what = f"{dtype}, {shape}, kernel {model.options.kernel_size}, {memory_format}{ours}{compiled}"
    return Variants("train.conv_block", what, {"torch": make(False), "triton": make(True)})


def _require_possible(options: TrainOptions, device: torch.device, synchronized: bool) -> None:
    if not runs_on(device):
        raise UserError("needs Triton and an NVIDIA GPU of compute capability 8.0 or more; use auto or torch")
    if options.depthwise == "torch":
        raise UserError("contains the Triton depthwise convolution, which train.depthwise = torch excludes")
    if options.memory_format == "contiguous":
        raise UserError("needs train.memory_format = channels_last or probe")
    if synchronized:
        raise UserError("cannot sum batch norm's statistics over processes, which train.sync_batch_norm asks for")


def choose_conv_block(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Sets `fused` of the conv blocks as `train.conv_block` says. Every process must call it.

    It is called after `choose_depthwise`, whose choice the variant `torch` has.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: `triton` is asked for where it cannot run.
    """
    synchronized = options.sync_batch_norm and processes.world_size > 1
    device, fused = processes.device, False
    notes: list[str] = []
    if options.conv_block == "triton":
        try:
            _require_possible(options, device, synchronized)
        except UserError as error:
            raise UserError(f"train.conv_block = 'triton': {error}") from None
        fused = True
    elif options.conv_block == "auto" and len(model.conv_blocks):
        variants = conv_block_variants(options, model, batch_size, image_size, dtype, device, synchronized=synchronized)
        name, notes = choose(variants, "auto", processes)
        fused = name == "triton"
        if options.compile is True:
            # What torch.compile has recorded about the blocks of the race must not affect the training model.
            torch._dynamo.reset()
    for block in model.conv_blocks:
        assert isinstance(block, ConvBlock)
        block.fused = fused
    return notes
