"""The ways to compute a conv block: by PyTorch, with our depthwise convolution, or in training as one operation.

Neither is always the fastest one. On H200 cards a block took 2.86 ms with PyTorch's convolution and 2.33 ms with ours
in one measurement, and 3.00 ms with PyTorch's and 3.33 ms with ours in another (records/LOG.md, 2026-11-27).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Final

import torch

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.variants.choice import NEEDS_TRITON, Pass, Variants, choose, images_of_pass
from sdpnet.model.kernels.depthwise import compiles_for, runs_on
from sdpnet.model.sdpnet import ConvBlock, SdPNet
from sdpnet.pipelines.errors import UserError

__all__ = ["CANDIDATES", "choose_conv_block", "conv_block_variants"]

# Name -> the attributes `triton` and `fused` of the blocks.
CANDIDATES: Final = {"torch": (False, False), "depthwise": (True, False), "triton": (True, True)}
# The gradient to the depthwise convolution's bias is a small sum of large terms: in bfloat16, PyTorch's differs from
# float64's by 3.3 % at the shape of the XL model, and ours by 2.6 %.
_BFLOAT16_TOLERANCE: Final = 0.1


def choose_conv_block(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Sets `triton` and `fused` of the conv blocks as `train.depthwise` and `train.conv_block` say.

    Every process must call it. Where more than one of `CANDIDATES` is allowed, the main process times them on its GPU.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: `triton` is asked for where it cannot run.
    """
    names = _allowed(options, processes)
    name = names[0]
    notes: list[str] = []
    if len(names) > 1 and len(model.conv_blocks):
        shape = (images_of_pass(options, batch_size), model.options.dim, *[image_size // model.options.patch_size] * 2)
        last = options.memory_format != "contiguous"
        compiled = options.compile is True
        variants = conv_block_variants(
            names,
            shape,
            model.options.kernel_size,
            dtype,
            processes.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
            compiled=compiled,
        )
        name, notes = choose(variants, "auto", processes)
    for block in model.conv_blocks:
        assert isinstance(block, ConvBlock)
        block.triton, block.fused = CANDIDATES[name]
    return notes


def _allowed(options: TrainOptions, processes: Processes) -> list[str]:
    """The names of the candidates that the config and the device allow: at least one, PyTorch's first."""
    possible = runs_on(processes.device)
    against_triton = ""
    if not possible:
        against_triton = NEEDS_TRITON
    elif options.depthwise == "torch":
        against_triton = "contains the Triton depthwise convolution, which train.depthwise = torch excludes"
    elif options.memory_format == "contiguous":
        against_triton = "needs train.memory_format = channels_last or probe"
    elif options.sync_batch_norm and processes.world_size > 1:
        against_triton = "cannot sum batch norm's statistics over processes, which train.sync_batch_norm asks for"
    if options.conv_block == "triton":
        if against_triton:
            raise UserError(f"train.conv_block = 'triton': {against_triton}")
        return ["triton"]
    if options.depthwise == "triton" and not possible:
        if compiles_for(processes.device):  # never run on such a card, so only where it is asked for
            return ["depthwise"]
        raise UserError(f"train.depthwise = 'triton': {NEEDS_TRITON.replace('8.0', '7.0')}")
    names = {"auto": ["torch", "depthwise"], "torch": ["torch"], "triton": ["depthwise"]}[options.depthwise]
    if not possible:
        return ["torch"]
    return names if against_triton or options.conv_block == "torch" else [*names, "triton"]


def conv_block_variants(
    names: Iterable[str],
    shape: tuple[int, ...],
    kernel_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    memory_format: torch.memory_format = torch.channels_last,
    compiled: bool = False,
    backward: bool = True,
) -> Variants:
    """Those of `CANDIDATES` with these names.

    Args:
        shape: the shape of the block's input: (B, dim, rows, columns).
        dtype: the dtype of the input. Parameters are float32, with autocast where `dtype` is another one.
        memory_format: the memory format of the block and of its input.
        compiled: whether the blocks are compiled.
        backward: whether a pass runs backward too. Without it the forward pass still saves what a backward pass needs.
    """

    def prepare(name: str) -> Pass:
        torch.manual_seed(0)
        block = ConvBlock(shape[1], kernel_size, 0.0).to(device).to(memory_format=memory_format)
        block.triton, block.fused = CANDIDATES[name]
        if compiled:
            compile_blocks([block])
        images, upstream = torch.randn(2, *shape, device=device, dtype=dtype)
        x, gradient = (value.contiguous(memory_format=memory_format) for value in (images, upstream))
        x.requires_grad_()

        def one_pass() -> list[torch.Tensor]:
            block.zero_grad(set_to_none=True)
            x.grad = None
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = block(x)
            if backward:
                out.backward(gradient)
            # The gradients come from products in `dtype`, so they agree to its precision only.
            return [out, *(p.grad.to(dtype) for p in (x, *block.parameters()) if p.grad is not None)]

        return one_pass

    what = f"{dtype}, {shape}, kernel {kernel_size}, {memory_format}{', compiled' if compiled else ''}"
    make = {name: functools.partial(prepare, name) for name in names}
    return Variants("train.conv_block", what, make, _BFLOAT16_TOLERANCE if dtype == torch.bfloat16 else None)
