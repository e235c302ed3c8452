"""The parts of GELU and its derivative in Triton, for all kernels that compute them."""

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "below_and_density", "gelu", "scaled_slope"]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # Triton's interpreter has no instructions


@triton.jit
def exp2(value):
    """2 to the power of float32 values; subnormal results are 0.

    `tl.exp2` scales for subnormal results, which takes three more instructions.
    """
    if INTERPRETED:
        return tl.exp2(value)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(value):
    """1 / value to one unit in the last place, for float32 values whose reciprocals are normal.

    A division scales for very large and small values, which takes three more instructions.
    """
    if INTERPRETED:
        return 1.0 / value
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1)


@triton.jit
def below_and_density(value):
    """The distribution function and the density of the normal distribution, to 8e-8.

    Both share one exponential (Abramowitz & Stegun, 7.1.26). This removed about 350 of 1,300 arithmetic instructions
    of the depthwise kernel's forward pass (records/LOG.md).
    """
    exponential = exp2(-0.7213475204444817 * value * value)  # exp(-value * value / 2)
    t = reciprocal(1.0 + 0.23164189 * tl.abs(value))  # 0.3275911 / sqrt(2)
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    tail *= exponential
    return tl.where(value < 0, tail, 1.0 - tail), 0.3989422804014327 * exponential


@triton.jit
def tail(value, exponential, FACTOR: tl.constexpr):
    """FACTOR * exponential * tail / exp(-value * value / 2), with the tail of the normal distribution above |value|.

    Args:
        value: |value| / sqrt(2 * log(2)), so that exp(-value * value / 2) is 2 ** -(value * value) of this argument.
        exponential: the exponential, possibly with a factor.
    """
    t = reciprocal(1.0 + 0.27273747 * value)  # 0.3275911 * sqrt(log(2))
    polynomial = FACTOR * -0.142248368 + t * (
        FACTOR * 0.7107068705 + t * (FACTOR * -0.7265760135 + t * (FACTOR * 0.5307027145))
    )
    return t * (FACTOR * 0.127414796 + t * polynomial) * exponential


@triton.jit
def gelu(value):
    """GELU(value) as max(value, 0) - |value| * tail(|value|), which has neither a comparison nor a selection."""
    distance = 0.8493218002880191 * tl.abs(value)
    return tl.maximum(value, 0.0) - distance * tail(distance, exp2(-distance * distance), 1.1774100225154747)


@triton.jit
def scaled_slope(value, scale, log_scale):
    """scale times the derivative of GELU at `value`.

    Both factors, scale and that of the density, are part of the exponent, where they cost no instruction.

    Args:
        scale: the factor.
        log_scale: its logarithm to the base 2.
    """
    distance = 0.8493218002880191 * tl.abs(value)
    density = exp2(log_scale - 1.3257480647361595 - distance * distance)
    above = tail(distance, density, 2.5066282746310002)
    return tl.where(value < 0, above, scale - above) + value * density
