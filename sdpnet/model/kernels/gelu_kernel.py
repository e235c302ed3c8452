"""The parts of GELU and its derivative in Triton, for all kernels that compute them."""

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "below_and_density"]

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
