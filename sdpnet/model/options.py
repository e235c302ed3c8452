"""The shape of an SdP-Net: its options and the named models. This module does not import torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, get_args

from sdpnet.pipelines.errors import UserError, nearest, require

__all__ = ["MODELS", "ModelOptions", "Position", "Stem", "create_model_options"]

Stem = Literal["patch", "conv"]
Position = Literal["none", "learned", "sincos", "rope"]


# These limits are far above what any machine can train, and no product of them overflows.
_LARGEST: Final[dict[str, int]] = {
    **dict.fromkeys(("conv_blocks", "transformer_blocks", "mlp_ratio", "patch_size", "kernel_size"), 512),
    **dict.fromkeys(("dim", "heads", "head_hidden", "registers"), 1 << 17),
    "num_classes": 1 << 24,
    "grid_size": 1 << 12,
}
_LARGEST_SCALE: Final = 1e6


@dataclass(frozen=True)
class ModelOptions:
    """The shape of an SdP-Net. Together with the weights it is all that is needed to rebuild a model.

    Attributes:
        num_classes: The number of classes.
        conv_blocks: ConvMixer-like blocks before the transformer blocks.
        transformer_blocks: Pre-norm transformer encoder blocks.
        dim: Channels of the conv blocks and width of the tokens; a multiple of `heads`.
        heads: Attention heads of a transformer block.
        mlp_ratio: Hidden width of a transformer block's feed-forward part, as a multiple of `dim`.
        patch_size: Pixels a side of a patch; images must be a multiple of it.
        kernel_size: Side of the conv blocks' depthwise kernel; an odd number.
        head_hidden: Width of the head's hidden tanh layer.
        registers: Register tokens beside the class token.
        dropout: Dropout rate in the feed-forward part of the transformer blocks.
        position: The position embedding of the patch tokens. `learned` is a parameter for `grid_size` x `grid_size`
            patches, which is resampled for other grids; `sincos` is fixed. Both are added to the patch tokens. `rope`
            rotates their queries and keys. Class and register tokens have no position.
        grid_size: The patches a side of the grid that a learned position embedding is made for.
        layer_scale: The initial factor of the two residual branches of a transformer block; 0 is without LayerScale.
        drop_path: The rate of stochastic depth in the last block. It rises linearly from 0 over all blocks.
        final_norm: Whether there is a LayerNorm before the head.
        stem: How images become patches. `patch` is one convolution with a stride of `patch_size`. `conv` is a stack of
            overlapping 3 x 3 convolutions of stride 2 (Xiao et al., 2021); `patch_size` must then be a power of 2.
        qk_norm: Whether each head normalises its queries and keys with a LayerNorm (ViT-22B, Dehghani et al., 2023).
        patch_dropout: The share of the patches that the transformer blocks do not get in training, drawn anew for each
            image and step (Liu et al., 2022). The conv blocks and evaluation use all patches. See also
            `train.full_patch_epochs`.
    """

    num_classes: int = 1000
    conv_blocks: int = 5
    transformer_blocks: int = 10
    dim: int = 768
    heads: int = 16
    mlp_ratio: int = 4
    patch_size: int = 16
    kernel_size: int = 7
    head_hidden: int = 1000
    registers: int = 4
    dropout: float = 0.0
    position: Position = "none"
    grid_size: int = 14
    layer_scale: float = 0.0
    drop_path: float = 0.0
    final_norm: bool = False
    stem: Stem = "patch"
    qk_norm: bool = False
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value, smallest = getattr(self, name), 0 if name in ("conv_blocks", "registers") else 1
            require(type(value) is int, f"model.{name}", value, "a whole number")
            require(smallest <= value <= largest, f"model.{name}", value, f"at least {smallest}, at most {largest:,}")
        if self.dim % self.heads:
            raise UserError(f"model.heads = {self.heads}: must divide model.dim = {self.dim}")
        if self.kernel_size % 2 == 0:
            raise UserError(f"model.kernel_size = {self.kernel_size}: must be odd")
        for name in ("dropout", "drop_path", "layer_scale", "patch_dropout"):
            value = getattr(self, name)
            ok = type(value) in (int, float) and 0 <= value < (_LARGEST_SCALE if name == "layer_scale" else 1)
            allowed = f"0 (off) or more, below {_LARGEST_SCALE:g}" if name == "layer_scale" else "in [0, 1)"
            require(ok, f"model.{name}", value, allowed)
        for name in ("final_norm", "qk_norm"):
            require(type(getattr(self, name)) is bool, f"model.{name}", getattr(self, name), "true or false")
        for name, words in (("position", get_args(Position)), ("stem", get_args(Stem))):
            if (value := getattr(self, name)) not in words:
                raise UserError(f"model.{name} = {value!r}: {nearest(str(value), words)}")
        if self.stem == "conv":
            power = self.patch_size >= 2 and self.patch_size.bit_count() == 1
            require(power, "model.patch_size", self.patch_size, "a power of 2, from 2, for model.stem = 'conv'")
            smallest = self.patch_size // 2
            require(
                self.dim % smallest == 0, "model.dim", self.dim, f"a multiple of {smallest} for model.stem = 'conv'"
            )
        width = {"sincos": self.dim, "rope": self.dim // self.heads}.get(self.position, 0)
        if width % 4:
            what = "model.dim" if self.position == "sincos" else "model.dim / model.heads"
            raise UserError(f"model.position = {self.position!r}: needs {what} = {width} to be a multiple of 4")


MODELS: Final[dict[str, ModelOptions]] = {
    "sdpnet_tiny": ModelOptions(
        conv_blocks=2, transformer_blocks=2, dim=128, heads=4, mlp_ratio=2, patch_size=8, head_hidden=128
    ),
    "sdpnet_l": ModelOptions(transformer_blocks=7),
    "sdpnet_xl": ModelOptions(),
    "sdpnet_xxl": ModelOptions(conv_blocks=20),
}


def create_model_options(name: str, num_classes: int = 1000, **overrides: Any) -> ModelOptions:
    """The options of a named model (see `MODELS`), with any field overridden. Raises as `create_model` does."""
    for word, known, what in (
        (name, MODELS, "model"),
        *((key, asdict(ModelOptions()), "model option") for key in overrides),
    ):
        if word not in known:
            raise UserError(f"unknown {what} {word!r}: {nearest(word, known)}")
    return replace(MODELS[name], num_classes=num_classes, **overrides)
