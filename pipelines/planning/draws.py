"""Counter-based random draws: uniforms, permutations and Beta quantiles, each a function of a key and counters.

- Uniforms are the SplitMix64 sequence of a key (Steele, Lea & Flood, "Fast splittable pseudorandom number generators",
  2014), read at `sample id * 64 + draw`.
- A permutation is a Feistel network with random round tables (Luby & Rackoff, 1988): the image of any position in
  constant time, without the whole permutation in memory.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np

__all__ = ["Permutation", "beta_quantile", "derive_seed", "sample_keys", "uniforms"]

_GAMMA: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
_ONE, _STEP = np.uint64(1), np.uint64(_GAMMA)
_SHIFTS, _FIRST, _SECOND = (
    np.array([30, 27, 31], np.uint64),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)
_DRAWS_PER_SAMPLE: Final = 64


def derive_seed(seed: int, *parts: int) -> int:
    """A 64-bit key from a seed and any number of integers (SplitMix64's finaliser, chained)."""
    key = _mix(seed & _MASK)
    for part in parts:
        key = _mix((key + _GAMMA * ((part & _MASK) + 1)) & _MASK)
    return key


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    """`_mix` in place, of uint64."""
    x ^= x >> _SHIFTS[0]
    x *= _FIRST
    x ^= x >> _SHIFTS[1]
    x *= _SECOND
    x ^= x >> _SHIFTS[2]
    return x


def _hashes(key: int, counters: np.ndarray) -> np.ndarray:
    x = counters.astype(np.uint64)
    x += _ONE
    x *= _STEP
    x += np.uint64(key)
    return _mix_array(x)


def uniforms(key: int, sample_ids: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """float64 (len(sample_ids), count) in [0, 1): draws `first`, `first + 1`, ... of each sample under this key."""
    assert first + count <= _DRAWS_PER_SAMPLE
    counters = sample_ids.astype(np.int64)[:, None] * _DRAWS_PER_SAMPLE + np.arange(first, first + count)
    x = _hashes(key, counters)
    x >>= np.uint64(11)
    return x * 2.0**-53


def sample_keys(key: int, sample_ids: np.ndarray) -> np.ndarray:
    """int64 (len(sample_ids),): a key for each sample, for draws made elsewhere."""
    return _hashes(key, sample_ids).view(np.int64)


class Permutation:
    """A keyed bijection of range(n): Feistel rounds, adding modulo, on the rectangle a x b just larger than n."""

    _ROUNDS: Final = 8

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self.a = max(1, math.isqrt(max(0, n - 1)) + 1)
        self.b = max(1, -(-n // self.a))
        hashes = _hashes(key, np.arange(self._ROUNDS * self.a)).reshape(self._ROUNDS, self.a)  # a >= b
        moduli = np.array([self.a, self.b] * (self._ROUNDS // 2), np.uint64)
        self.tables = (hashes % moduli[:, None]).astype(np.int64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 positions in [0, n) -> int64 images in [0, n)."""
        result = np.empty(len(positions), np.int64)
        for start in range(0, len(positions), 1 << 15):  # pieces that stay in the cache
            result[start : start + (1 << 15)] = self._walk(positions[start : start + (1 << 15)])
        return result

    def _walk(self, x: np.ndarray) -> np.ndarray:
        x = self._rounds(x)
        outside = np.flatnonzero(x >= self.n)
        while len(outside):  # the rectangle exceeds n by less than one row: few samples, few turns
            x[outside] = self._rounds(x[outside])
            outside = outside[x[outside] >= self.n]
        return x

    def _rounds(self, x: np.ndarray) -> np.ndarray:
        left, right = np.divmod(x, self.b)
        for round_, table in enumerate(self.tables):
            if round_ % 2 == 0:
                left += table[right]
                left -= self.a * (left >= self.a)
            else:
                right += table[left]
                right -= self.b * (right >= self.b)
        return left * self.b + right


def beta_quantile(u: np.ndarray, alpha: float) -> np.ndarray:
    """The quantile function of Beta(alpha, alpha) at `u` in [0, 1], from a table (error below 1e-6 up to alpha 2).

    With t = s**(1/alpha) the density's singularity at 0 disappears; symmetry gives the upper half.
    """
    if alpha == 1.0:
        return np.asarray(u, np.float64)
    cumulative, s = _beta_table(alpha)
    lower = np.minimum(u, 1 - u)
    x = np.interp(lower * 2 * cumulative[-1], cumulative, s) ** (1 / alpha)
    return np.where(u < 0.5, x, 1 - x)


@lru_cache(maxsize=16)
def _beta_table(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    s = np.linspace(0.0, 0.5**alpha, 4097)
    middle = 0.5 * (s[1:] + s[:-1])
    ends, centres = (1 - s ** (1 / alpha)) ** (alpha - 1), (1 - middle ** (1 / alpha)) ** (alpha - 1)
    pieces = (ends[:-1] + 4 * centres + ends[1:]) * np.diff(s) / 6  # Simpson's rule
    return np.concatenate([[0.0], np.cumsum(pieces)]), s
