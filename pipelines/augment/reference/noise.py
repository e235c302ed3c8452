"""Counter-based normal noise: each value is a function of a sample's key and a position, on any device."""

from __future__ import annotations

import math

import torch

__all__ = ["counter_hashes", "normal_noise"]


def _signed(x: int) -> int:
    """The int64 with the same bits as the uint64 x."""
    return x - (1 << 64) if x >= 1 << 63 else x


_GAMMA, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def counter_hashes(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Outputs 0, 1, ..., count - 1 of SplitMix64 from each key: int64 (B, count) from int64 (B,).

    This is the generator of `sdpnet.pipelines.planning.draws`. It uses integers only and is equal on every device.
    """
    # torch supports few operations on uint64. int64 products wrap around to the same bits; a right shift copies the
    # sign bit, which the masks clear.
    positions = torch.arange(1, count + 1, device=keys.device)
    x = keys.view(-1, 1) + positions * _GAMMA
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def normal_noise(keys: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise (Box & Muller, 1958), float32 (B, *shape), from the keys, int64 (B,), of B samples.

    Devices agree up to the last bits of their logarithm and cosine.
    """
    hashes = counter_hashes(keys, math.prod(shape))
    radius = ((hashes >> 40 & (1 << 24) - 1) + 1).float().mul_(2.0**-24)  # in (0, 1]: float32 has all 24 bits
    angle = (hashes & (1 << 24) - 1).float().mul_(2.0**-24 * 2 * math.pi)
    return radius.log_().mul_(-2).sqrt_().mul_(angle.cos_()).view(-1, *shape)
