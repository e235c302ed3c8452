"""Operation counts of a model: multiply-accumulates of a forward pass, and FLOPs of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdpnet.model.patch_dropout import kept_patches
from sdpnet.model.sdpnet import ModelOptions
from sdpnet.model.stem import stem_channels

__all__ = ["TRAINING_FLOPS_PER_MAC", "conv_block_macs", "counted_macs", "forward_macs", "stem_macs"]

TRAINING_FLOPS_PER_MAC: Final = 6  # 2 FLOPs in the forward pass, and two products of 2 FLOPs in the backward pass


def forward_macs(options: ModelOptions, image_size: int, patch_dropout: float = 0.0) -> int:
    """Multiply-accumulates of an SdP-Net's matrix products and convolutions for an image of `image_size` pixels a side.

    Norms, activations, softmax and additions are left out, as usual.

    Args:
        patch_dropout: the rate of patch dropout; 0 counts all patches, as in evaluation.
    """
    dim, patches = options.dim, (image_size // options.patch_size) ** 2
    tokens = 1 + options.registers + (kept_patches(patches, patch_dropout) if patch_dropout else patches)
    projections = tokens * dim * dim * (4 + 2 * options.mlp_ratio)
    attention = 2 * tokens * tokens * dim
    head = options.head_hidden * (dim + options.num_classes)
    transformer_blocks = options.transformer_blocks * (projections + attention)
    return stem_macs(options, image_size) + conv_block_macs(options, image_size) + transformer_blocks + head


def stem_macs(options: ModelOptions, image_size: int) -> int:
    """The part of `forward_macs` that `model.stem` takes."""
    dim, patches = options.dim, (image_size // options.patch_size) ** 2
    if options.stem == "patch":
        return patches * dim * 3 * options.patch_size**2
    macs, inputs, side = patches * dim * dim, 3, image_size
    for channels in stem_channels(dim, options.patch_size):
        side //= 2
        macs += side**2 * channels * inputs * 3**2
        inputs = channels
    return macs


def conv_block_macs(options: ModelOptions, image_size: int) -> int:
    """The part of `forward_macs` that the conv blocks take."""
    patches = (image_size // options.patch_size) ** 2
    return options.conv_blocks * patches * options.dim * (options.kernel_size**2 + options.dim)


def counted_macs(make: Callable[[], nn.Module], image_size: int) -> int:
    """The multiply-accumulates of a forward pass of any model, as torch counts them.

    `make` is called on the meta device, so that the model takes no memory.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        make().eval()(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2
