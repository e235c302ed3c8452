"""SdP-Net: a patch convolution, ConvMixer-like blocks, then a transformer encoder with class and register tokens.

    images (B, 3, H, W) -> patches (B, dim, H/16, W/16) -> conv blocks -> tokens [class, registers, patches]
    (B, 1 + R + N, dim) -> transformer blocks -> class token -> tanh head -> logits (B, num_classes)

Sources: ConvMixer (Trockman & Kolter, 2022) for the convolutional part, ViT (Dosovitskiy et al., 2020) for the pre-norm
encoder and its head with one hidden tanh layer, registers from Darcet et al., 2023.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from pipelines.errors import UserError, nearest

__all__ = ["MODELS", "ModelOptions", "SdPNet", "create_model", "create_model_options"]


@dataclass(frozen=True)
class ModelOptions:
    """The shape of an SdP-Net; together with the weights it is all that is needed to rebuild one."""

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

    def __post_init__(self) -> None:
        for name in ("num_classes", "dim", "heads", "mlp_ratio", "patch_size", "kernel_size", "head_hidden"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("conv_blocks", "transformer_blocks", "registers"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} = {getattr(self, name)}: must be 0 or more")
        if self.dim % self.heads:
            raise UserError(f"model.heads = {self.heads}: must divide model.dim = {self.dim}")
        if self.kernel_size % 2 == 0:
            raise UserError(f"model.kernel_size = {self.kernel_size}: must be odd")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout = {self.dropout}: must be in [0, 1)")


MODELS: Final[dict[str, ModelOptions]] = {
    "sdpnet_tiny": ModelOptions(
        conv_blocks=2, transformer_blocks=2, dim=128, heads=4, mlp_ratio=2, patch_size=8, head_hidden=128
    ),
    "sdpnet_l": ModelOptions(transformer_blocks=7),
    "sdpnet_xl": ModelOptions(),
    "sdpnet_xxl": ModelOptions(conv_blocks=20),
}


class ConvBlock(nn.Module):
    """y = BN(GELU(depthwise(x))); BN(GELU(conv1x1(x + y))): (B, dim, h, w) -> the same shape."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm1(F.gelu(self.depthwise(x)))
        return self.norm2(F.gelu(self.pointwise(x)))


class TransformerBlock(nn.Module):
    """Pre-norm encoder block; dropout in the feed-forward part only: (B, tokens, dim) -> the same shape."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_ratio * dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class SdPNet(nn.Module):
    """The model. `forward` takes images (B, 3, H, W) of any H, W that are at least the patch size."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        dim = options.dim
        self.patch = nn.Conv2d(3, dim, options.patch_size, stride=options.patch_size)
        self.patch_norm = nn.BatchNorm2d(dim)
        self.conv_blocks = nn.Sequential(*(ConvBlock(dim, options.kernel_size) for _ in range(options.conv_blocks)))
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.registers = nn.Parameter(torch.zeros(1, options.registers, dim))
        self.transformer_blocks = nn.Sequential(
            *(
                TransformerBlock(dim, options.heads, options.mlp_ratio, options.dropout)
                for _ in range(options.transformer_blocks)
            )
        )
        self.head = nn.Sequential(
            nn.Linear(dim, options.head_hidden), nn.Tanh(), nn.Linear(options.head_hidden, options.num_classes)
        )
        self._initialize()

    def _initialize(self) -> None:
        """Truncated normal 0.02 for the encoder, tokens and head, as in ViT; PyTorch's own for the convolutions."""
        for module in (*self.transformer_blocks.modules(), *self.head.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        if self.options.registers:
            nn.init.trunc_normal_(self.registers, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images float (B, 3, H, W), normalised -> logits (B, num_classes)."""
        x = self.conv_blocks(self.patch_norm(self.patch(images)))
        batch = x.shape[0]
        tokens = torch.cat(
            [
                self.class_token.expand(batch, -1, -1).to(x.dtype),
                self.registers.expand(batch, -1, -1).to(x.dtype),
                x.flatten(2).transpose(1, 2),
            ],
            dim=1,
        )
        return self.head(self.transformer_blocks(tokens)[:, 0])

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def create_model_options(name: str, num_classes: int = 1000, **overrides: Any) -> ModelOptions:
    """The options of a named model (see `MODELS`) with any field overridden; raises as `create_model` does."""
    for word, known, what in (
        (name, MODELS, "model"),
        *((key, asdict(ModelOptions()), "model option") for key in overrides),
    ):
        if word not in known:
            raise UserError(f"unknown {what} {word!r}: {nearest(word, known)}")
    return replace(MODELS[name], num_classes=num_classes, **overrides)


def create_model(name: str, num_classes: int = 1000, **overrides: Any) -> SdPNet:
    """A randomly initialised SdP-Net by name (see `MODELS`), with any field of `ModelOptions` overridden.

    Raises `UserError` for an unknown name or field, naming the nearest, and for impossible values.
    """
    return SdPNet(create_model_options(name, num_classes, **overrides))
