"""Float8 in the linear layers of the transformer blocks by torchao (`train.fp8`), and whether it is faster.

Inputs, weights and gradients are scaled by their largest values and rounded to eight bits for each product; sums,
weights and the optimizer keep their precision (Micikevicius et al., 2022). The layers keep their parameters, so state
dicts do not change.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.variants.choice import Pass, Variants, choose, images_of_pass
from sdpnet.model.sdpnet import DropPath, SdPNet, TransformerBlock
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.terminal.remedy import install_extra

__all__ = ["RECIPES", "choose_fp8", "fp8_variants", "to_float8"]

RECIPES: Final = ("tensorwise", "rowwise")
_LAYERS: Final = ("qkv", "proj", "mlp.0", "mlp.3")
_LEAST_CAPABILITY: Final = (8, 9)
_MULTIPLE: Final = 16  # the products of float8 take widths that are multiples of it
# Rounding to three bits of mantissa moves a value by up to 6 %, and to two bits, as gradients are, by up to 12 %.
_TOLERANCE: Final = 0.25


def choose_fp8(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Converts the transformer blocks of `model` as `train.fp8` says. Every process must call it.

    `auto` times a forward and backward pass of a block with and without float8 on a GPU and takes the fastest. To be
    called before blocks are compiled, and after the average has been made, which is to be without float8.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: float8 is asked for where it is not possible.
    """
    if options.fp8 == "off" or (options.fp8 == "auto" and not len(model.transformer_blocks)):
        return []
    variants = fp8_variants(options, model, batch_size, image_size, dtype, processes.device)
    if options.fp8 == "auto" and (reason := _reason(model, dtype, processes.device)):
        return [f"fp8: off; {reason}"] if processes.device.type == "cuda" else []
    recipe, notes = choose(variants, options.fp8, processes)
    if recipe != "off":
        for block in model.transformer_blocks:
            to_float8(block, recipe)
    return notes


def fp8_variants(
    options: TrainOptions,
    model: SdPNet,
    batch_size: int,
    image_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    emulate: bool = False,
) -> Variants:
    """A transformer block of `model` without float8 ("off") and with each of `RECIPES`.

    Args:
        emulate: whether the products are computed in float32 from the rounded values, on devices without float8.
    """
    shape = model.options
    tokens = 1 + shape.registers + (image_size // shape.patch_size) ** 2
    size = (images_of_pass(options, batch_size), tokens, shape.dim)
    compiled = options.compile is True
    what = f"{dtype}, {size}, {shape.heads} heads, {shape.mlp_ratio} x {shape.dim}{', compiled' if compiled else ''}"

    def make(recipe: str) -> Pass:
        if recipe != "off" and not emulate and (reason := _reason(model, dtype, device)):
            raise UserError(reason)
        generator = torch.Generator(device).manual_seed(0)
        block: Any = copy.deepcopy(model.transformer_blocks[0]).to(device).train()
        for module in block.modules():  # their draws would differ from variant to variant
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, DropPath):
                module.drops = False
        if recipe != "off":
            to_float8(block, recipe, emulate=emulate)
        if compiled:
            compile_blocks([block])
        x, gradient = (torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(2))
        x.requires_grad_()

        def one_pass() -> Sequence[torch.Tensor]:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = block(x)
            return [out, *torch.autograd.grad(out, [x, *block.parameters()], gradient.to(out.dtype))]

        return one_pass

    names = ("off", *RECIPES)
    return Variants("train.fp8", what, {name: lambda name=name: make(name) for name in names}, _TOLERANCE)  # type: ignore[misc]


def to_float8(block: nn.Module, recipe: str, *, emulate: bool = False) -> None:
    """Makes the linear layers of a transformer block multiply in float8 while it trains. Its parameters stay.

    Args:
        recipe: one of `RECIPES`.
        emulate: see `fp8_variants`.

    Raises:
        UserError: torchao is missing.
    """
    assert isinstance(block, TransformerBlock)
    torchao, layer = _torchao()
    config = torchao.Float8LinearConfig.from_recipe_name(recipe)
    config = replace(config, emulate=True) if emulate else config
    torchao.convert_to_float8_training(block, config=config, module_filter_fn=lambda module, name: name in _LAYERS)
    for name in _LAYERS:
        block.get_submodule(name).__class__ = layer


@functools.cache
def _torchao() -> tuple[Any, type]:
    """torchao.float8, and its linear layer with plain arithmetic outside of training."""
    try:
        torchao = importlib.import_module("torchao.float8")
        base = importlib.import_module("torchao.float8.float8_linear").Float8Linear
    except ImportError as error:
        raise UserError(f"needs torchao ({error}): {install_extra('fp8')}") from None

    class Float8Linear(base):  # type: ignore[misc, valid-type]
        """torchao's linear layer in training, torch's in evaluation, under the autocast of any device."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if not self.training:
                return F.linear(input, self.weight, self.bias)
            if torch.is_autocast_enabled(input.device.type):
                input = input.to(torch.get_autocast_dtype(input.device.type))
            return super().forward(input)

    return torchao, Float8Linear


def _reason(model: SdPNet, dtype: torch.dtype, device: torch.device) -> str:
    """Why float8 is not possible, or ""."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "needs a GPU of compute capability 8.9 or more"
    if dtype != torch.bfloat16:
        return "needs train.amp = bf16"
    if model.options.dim % _MULTIPLE:
        return f"needs a model.dim that is a multiple of {_MULTIPLE}"
    try:
        _torchao()
    except UserError as error:
        return str(error)
    return ""
