"""SdP-Net: a patch convolution, ConvMixer-like blocks, then a transformer encoder with class and register tokens.

    images (B, 3, H, W) -> patches (B, dim, H/16, W/16) -> conv blocks -> tokens [class, registers, patches]
    (B, 1 + R + N, dim) -> transformer blocks -> class token -> tanh head -> logits (B, num_classes)

Sources: ConvMixer (Trockman & Kolter, 2022) for the convolutional part, ViT (Dosovitskiy et al., 2020) for the pre-norm
encoder and its head with one hidden tanh layer, registers from Darcet et al., 2023. Off by default: position embeddings
(`sdpnet.model.positions`), LayerScale (Touvron et al., 2021), stochastic depth (Huang et al., 2016), a final norm, an
overlapping stem (`sdpnet.model.stem`), norms of queries and keys (Dehghani et al., 2023), patch dropout
(`sdpnet.model.patch_dropout`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from sdpnet.model.dropout import draw_keys
from sdpnet.model.feed_forward import FeedForward
from sdpnet.model.kernels import conv_block
from sdpnet.model.kernels.attention import attention, takes
from sdpnet.model.kernels.depthwise import depthwise_gelu
from sdpnet.model.options import MODELS, ModelOptions, Position, create_model_options
from sdpnet.model.patch_dropout import drop_patches
from sdpnet.model.patch_product import patch_product
from sdpnet.model.positions import resample_grid, rotary_embedding, rotate, sincos_embedding
from sdpnet.model.stem import make_stem

__all__ = ["MODELS", "ModelOptions", "Position", "SdPNet", "create_model", "create_model_options"]


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016) on inputs of any shape (B, ...).

    In training, a sample is set to 0 with probability `rate`; otherwise it is divided by 1 - rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.drops = rate > 0
        # torch.compile makes a graph for each number that a module holds, and at most eight of one piece of code. As a
        # number, the rate left 16 of the 30 blocks of a modern XXL uncompiled (records/LOG.md); as a tensor, the blocks
        # share their graphs.
        self.kept: torch.Tensor
        self.register_buffer("kept", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.factor(x)
        return x if factor is None else x * factor.to(x.dtype)

    def factor(self, x: torch.Tensor) -> torch.Tensor | None:
        """The factors that `forward` draws for x (B, ...): float32 (B, 1, ...), or None if they are all 1."""
        if not self.training or not self.drops:
            return None
        taken = torch.rand([len(x)] + [1] * (x.ndim - 1), device=x.device) < self.kept
        return taken / self.kept

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor (Touvron et al., 2021): (..., dim) -> the same shape.

    The factors are float32, so under autocast the product and with it the residual stream are float32 too. In bfloat16
    the sum would lose a branch that is multiplied by 1e-4.
    """

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class ConvBlock(nn.Module):
    """y = BN(GELU(depthwise(x))); BN(GELU(conv1x1(x + y))): (B, dim, h, w) -> the same shape.

    `drop_path` is applied to y, the only residual branch. With `triton` set, `sdpnet.model.kernels.depthwise` computes
    GELU(depthwise(x)) from the same parameters. With `fused` set, `sdpnet.model.kernels.conv_block` computes the whole
    block in training.
    """

    def __init__(self, dim: int, kernel_size: int, drop_path: float) -> None:
        super().__init__()
        self.triton = False
        self.fused = False
        self.depthwise = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused and conv_block.takes(x, self.norm1, self.norm2):
            factor = self.drop_path.factor(x)
            return conv_block.fused_conv_block(x, self.depthwise, self.norm1, factor, self.pointwise, self.norm2)
        if self.triton:
            assert self.depthwise.bias is not None
            y = depthwise_gelu(x, self.depthwise.weight, self.depthwise.bias)
        else:
            y = F.gelu(self.depthwise(x))
        x = x + self.drop_path(self.norm1(y))
        return self.norm2(F.gelu(self.pointwise(x)))


class TransformerBlock(nn.Module):
    """Pre-norm encoder block with dropout in the feed-forward part only: (B, tokens, dim) -> the same shape.

    `rotary` is the result of `sdpnet.model.positions.rotary_embedding` for the tokens, or None. `keys` decide what
    dropout drops (see `FeedForward`). With `triton` set, `sdpnet.model.kernels.attention` computes the attention
    wherever it can.
    """

    def __init__(self, options: ModelOptions, drop_path: float) -> None:
        super().__init__()
        self.triton = False
        dim, heads = options.dim, options.heads
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // heads) if options.qk_norm else nn.Identity() for _ in range(2))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, options.mlp_ratio * dim, options.dropout)
        self.scale1, self.scale2 = (
            LayerScale(dim, options.layer_scale) if options.layer_scale else nn.Identity() for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor | None = None, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = x + self.drop_path(self.scale1(self.attention(self.norm1(x), rotary)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x), keys)))

    def attention(self, x: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        if self.triton and takes(tokens, dim // self.heads, qkv.dtype):
            return self.proj(attention(self._normed_and_rotated(qkv, rotary)))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # under autocast, a LayerNorm returns float32
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))

    def _normed_and_rotated(self, qkv: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        """Queries, keys and values (B, tokens, 3, heads, width) for our kernel: torch.compile makes one pass of it."""
        if rotary is None and isinstance(self.q_norm, nn.Identity):
            return qkv
        q, k, v = qkv.unbind(2)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotary is not None:  # (2, tokens, width), or with patch dropout (2, B, 1, tokens, width)
            rotary = rotary.unsqueeze(2) if rotary.ndim == 3 else rotary.transpose(2, 3)
            q, k = rotate(q, rotary), rotate(k, rotary)
        return torch.stack([q, k, v], dim=2)


class SdPNet(nn.Module):
    """The model. `forward` takes images (B, 3, H, W) whose sides are at least the patch size.

    Attributes:
        checkpointing: if True, training keeps only the inputs of the blocks and computes the rest a second time in the
            backward pass, with the same random draws. The gradients are the same; it takes less memory and about a
            third more time.
        patch_as_product: whether `sdpnet.model.patch_product` computes the patch convolution from the same parameters.
        patch_dropout: the rate of patch dropout in training. It is `options.patch_dropout` until a schedule sets it.
        watch_conv_blocks: if set, it is called with the input of the first conv block and "begin", and with the output
            of the last one and "end". A benchmark times the conv blocks with it, because torch.compile would trace
            hooks of modules.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        self.checkpointing = False
        self.patch_as_product = False
        self.patch_dropout = options.patch_dropout
        self.watch_conv_blocks: Callable[[torch.Tensor, Literal["begin", "end"]], object] | None = None
        dim = options.dim
        self.patch = make_stem(options.stem, dim, options.patch_size)
        self.patch_norm = nn.BatchNorm2d(dim)
        depth = options.conv_blocks + options.transformer_blocks
        rates = [options.drop_path * block / max(1, depth - 1) for block in range(depth)]
        self.conv_blocks = nn.Sequential(
            *(ConvBlock(dim, options.kernel_size, rate) for rate in rates[: options.conv_blocks])
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.registers = nn.Parameter(torch.zeros(1, options.registers, dim))
        if options.position == "learned":
            self.position_embedding = nn.Parameter(torch.zeros(1, options.grid_size**2, dim))
        self.transformer_blocks = nn.Sequential(
            *(TransformerBlock(options, rate) for rate in rates[options.conv_blocks :])
        )
        self.norm = nn.LayerNorm(dim) if options.final_norm else nn.Identity()
        self.head = nn.Sequential(
            nn.Linear(dim, options.head_hidden), nn.Tanh(), nn.Linear(options.head_hidden, options.num_classes)
        )
        self._initialize()

    def _initialize(self) -> None:
        """Initialises encoder, tokens and head as in ViT (truncated normal, 0.02). Convolutions keep PyTorch's."""
        for module in (*self.transformer_blocks.modules(), *self.head.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        if self.options.registers:
            nn.init.trunc_normal_(self.registers, std=0.02)
        if self.options.position == "learned":
            nn.init.trunc_normal_(self.position_embedding, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images, float (B, 3, H, W) -> logits (B, num_classes)."""
        return self.head(self.norm(self.tokens(images)[:, 0]))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Images as for `forward` -> the last block's tokens [class, registers, patches] (B, 1 + R + N, dim).

        In training with patch dropout, N is the number of patches that remain.
        """
        product = isinstance(self.patch, nn.Conv2d) and self.patch_as_product
        x = patch_product(images, self.patch.weight, self.patch.bias) if product else self.patch(images)  # type: ignore[arg-type]
        x = self.patch_norm(x)
        if self.watch_conv_blocks is not None:
            self.watch_conv_blocks(x, "begin")
        for block in self.conv_blocks:
            x = self._run(block, x)
        if self.watch_conv_blocks is not None:
            self.watch_conv_blocks(x, "end")
        x, rotary = self.encoder_input(x)
        if self.training and self.patch_dropout:
            x, rotary = drop_patches(x, rotary, 1 + self.options.registers, self.patch_dropout)
        for block, keys in zip(self.transformer_blocks, self._dropout_keys(x), strict=True):
            x = self._run(block, x, rotary, keys)
        return x

    def _dropout_keys(self, x: torch.Tensor) -> Iterable[torch.Tensor | None]:
        """For each transformer block, what its dropouts of tokens (B, 1 + R + N, dim) draw from; None without dropout.

        They are inputs of the blocks, so that a block drops the same again when its activations are recomputed.
        """
        options, blocks = self.options, len(self.transformer_blocks)
        if not self.training or options.dropout == 0:
            return [None] * blocks
        return draw_keys(blocks, len(x) * x.shape[1], options.dim * options.mlp_ratio, x.device)

    def encoder_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The inputs of the transformer blocks: patches (B, dim, h, w) -> (tokens (B, 1 + R + N, dim), `rotary`).

        Learned and sine-cosine positions are added to the tokens; `rotary` is that of `TransformerBlock`.
        """
        batch, dim, rows, columns = x.shape
        options, grid, wide = self.options, (rows, columns), torch.promote_types(x.dtype, torch.float32)
        x, rotary = x.flatten(2).transpose(1, 2), None
        if options.position == "learned":
            x = x + resample_grid(self.position_embedding, grid).to(x.dtype)
        elif options.position == "sincos":
            x = x + sincos_embedding(grid, dim, x.device, wide).to(x.dtype)
        elif options.position == "rope":
            rotary = rotary_embedding(grid, 1 + options.registers, dim // options.heads, x.device, wide)
        leading = [token.expand(batch, -1, -1).to(x.dtype) for token in (self.class_token, self.registers)]
        return torch.cat([*leading, x], dim=1), rotary

    def _run(self, block: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        if torch.compiler.is_compiling():  # a compiled recomputation does not write to buffers anyway
            return checkpoint(block, *inputs, use_reentrant=False)
        contexts = lambda: (nullcontext(), _statistics_kept(block))  # noqa: E731
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """A context in which a block is computed a second time without updating the running statistics of its batch norms.

    Otherwise every training step with activation checkpointing would move them twice.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]  # includes SyncBatchNorm
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # With track_running_stats=False, the recomputation would save other tensors for the backward pass than the
        # first forward pass did, which torch reports as an error.
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def create_model(name: str, num_classes: int = 1000, **overrides: Any) -> SdPNet:
    """Creates a randomly initialised SdP-Net.

    Args:
        name: a key of `MODELS`.
        num_classes: the number of logits.
        **overrides: values for any fields of `ModelOptions`.

    Raises:
        UserError: a name or field is unknown (the message names the nearest one), or a value is out of range.
    """
    return SdPNet(create_model_options(name, num_classes, **overrides))
