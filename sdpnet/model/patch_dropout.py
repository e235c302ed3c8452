"""Patch dropout: in training, the encoder gets a random part of each image's patches (Liu et al., 2022)."""

from __future__ import annotations

import torch

__all__ = ["drop_patches", "kept_patches"]


def kept_patches(num_patches: int, rate: float) -> int:
    """The number of patches that remain of each image, at least 1, rounded down as in timm's `PatchDropout`."""
    return max(1, int(num_patches * (1 - rate)))


def drop_patches(
    x: torch.Tensor, rotary: torch.Tensor | None, num_prefix: int, rate: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keeps a random subset of the patch tokens of each image, in their order, and all tokens before them.

    Positions must have been added to the tokens before. A rotary embedding is reduced to the tokens that remain.

    Args:
        x: tokens (B, num_prefix + N, dim).
        rotary: of all tokens, (2, num_prefix + N, width), or None.
        num_prefix: the number of tokens that are not patches: the class token and the registers.
        rate: the share of the patches that are dropped, in (0, 1).

    Returns:
        The tokens (B, num_prefix + K, dim), and the rotary embedding (2, B, 1, num_prefix + K, width) or None. K is
        `kept_patches(N, rate)`.
    """
    batch, tokens, dim = x.shape
    kept = kept_patches(tokens - num_prefix, rate)
    drawn = torch.rand(batch, tokens - num_prefix, device=x.device)
    patches = drawn.topk(kept, dim=1).indices.sort(dim=1).values + num_prefix
    prefix = torch.arange(num_prefix, device=x.device).expand(batch, -1)
    indices = torch.cat([prefix, patches], dim=1)
    if rotary is not None:
        rotary = rotary[:, indices].unsqueeze(2)
    return x.gather(1, indices.unsqueeze(2).expand(-1, -1, dim)), rotary
