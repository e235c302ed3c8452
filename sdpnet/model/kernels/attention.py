"""Attention over the packed result of the product for queries, keys and values, in Triton, for short sequences.

    forward   qkv (B, T, 3, H, D) -> out (B, T, H * D), lse (B, H, S), where S is T rounded up to a multiple of 16
    backward  qkv, out, lse, gradient (B, T, H * D) -> gradient to qkv (B, T, 3, H, D)

`torch.nn.functional.scaled_dot_product_attention` takes three tensors and returns their gradients as three tensors,
which a training step then copies into one. Its kernels are also made for long sequences: they compute 256 x 256 scores
of 64 channels where there are 201 x 201 of 48. These kernels see all keys of a head at once (`attention_kernel`).

All sums have a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from sdpnet.pipelines import triton_support

__all__ = ["attention", "runs_on", "takes"]

_LEAST_CAPABILITY = (8, 0)
_LEAST_SHARED_MEMORY: Final = 160 << 10  # bytes; 256 tokens and 64 channels take 158 KB on compute capability 8.0
_MOST_TOKENS: Final = 256  # a program keeps all keys and values of a head in shared memory
_MOST_WIDTH: Final = 64  # channels of a head
_DTYPES: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides its work.

    Attributes:
        rows: rows of scores that a program computes at a time.
        chunk: columns of scores that it computes at a time.
        warps: groups of 32 threads of a program.
        stages: iterations of the loop over rows whose values are loaded ahead, plus one.
        hoist: whether values that are the same in all iterations of the loop over rows may stay in registers. Without
            it, each iteration computes them anew, and more programs run at a time.
        registers: the maximum for a thread, or None for the compiler's choice.
    """

    rows: int = 64
    chunk: int = 64
    warps: int = 4
    stages: int = 2
    hoist: bool = True
    registers: int | None = None


# The fastest of 18 on an H200, for 16 heads of 48 channels and 12 heads of 64 (records/LOG.md).
_FORWARD = Tiling(stages=1, hoist=False, registers=168)
_FORWARD_WIDE = Tiling(stages=1, hoist=False)  # heads of more than 48 channels would spill with 168 registers
_QUERIES = Tiling(hoist=False)
_KEYS = Tiling(hoist=False)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on `device`: an NVIDIA GPU of compute capability 8.0 or more with 160 KB of shared memory
    for a program, which is all of data centres, with Triton installed."""
    if not triton_support.runs_on(device, _LEAST_CAPABILITY, _kernels):
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= _LEAST_SHARED_MEMORY


@functools.cache
def _kernels() -> Any:
    """The module with the kernels, or None if Triton cannot be imported."""
    modules = triton_support.import_kernels("sdpnet.model.kernels.attention_kernel")
    return None if modules is None else modules[0]


def takes(tokens: int, width: int, dtype: torch.dtype) -> bool:
    """Whether `attention` computes sequences of this length, with heads of this width and in this dtype.

    The products of float32 would either be rounded to TensorFloat-32, which PyTorch does not do by default, or be slow.
    """
    return tokens <= _MOST_TOKENS and width <= _MOST_WIDTH and width % 8 == 0 and dtype in _DTYPES


def attention(qkv: torch.Tensor) -> torch.Tensor:
    """Attention without a mask, with scores divided by the square root of D.

    Args:
        qkv: queries, keys and values: (B, T, 3, H, D). It is copied unless it is contiguous. `takes` tells which sizes
            and dtypes are possible.

    Returns:
        (B, T, H * D) in the dtype of qkv.
    """
    return _forward(qkv, torch.is_grad_enabled() and qkv.requires_grad)[0]


@torch.library.custom_op("sdpnet::attention", mutates_args=())
def _forward(qkv: torch.Tensor, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and with `training` the logarithms of the softmax's sums, (B, H, S) in float32, else an empty one."""
    qkv = qkv.contiguous()
    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * width)
    lse = qkv.new_empty((batch, heads, -(-tokens // 16) * 16) if training else 0, dtype=torch.float32)
    grid, constants = _constants(_FORWARD if width <= 48 else _FORWARD_WIDE, qkv)
    if out.numel():
        with torch.cuda.device_of(qkv):
            _kernels().attention_forward_kernel[grid](
                qkv, out, lse, _scale(width) * _LOG2_E, TRAINING=training, **constants
            )
    return out, lse


@_forward.register_fake
def _(qkv: torch.Tensor, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * width)
    return out, qkv.new_empty((batch, heads, -(-tokens // 16) * 16) if training else 0, dtype=torch.float32)


@torch.library.custom_op("sdpnet::attention_backward", mutates_args=())
def _backward(gradient: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The gradient to qkv, contiguous."""
    gradient, qkv, out = gradient.contiguous(), qkv.contiguous(), out.contiguous()
    grad_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    scale = _scale(qkv.shape[-1])
    if out.numel():
        with torch.cuda.device_of(qkv):
            grid, constants = _constants(_QUERIES, qkv)
            scales = scale * _LOG2_E, scale
            _kernels().attention_query_kernel[grid](qkv, gradient, out, lse, delta, grad_qkv, *scales, **constants)
            grid, constants = _constants(_KEYS, qkv)
            _kernels().attention_key_kernel[grid](qkv, gradient, lse, delta, grad_qkv, *scales, **constants)
    return grad_qkv


@_backward.register_fake
def _(gradient: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise torch would allocate zeros as the gradient of the logarithms


def _differentiate(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
    return _backward(gradient, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)

_LOG2_E: Final = math.log2(math.e)  # the kernels compute powers of 2


def _scale(width: int) -> float:
    return 1 / math.sqrt(width)


def _constants(tiling: Tiling, qkv: torch.Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a kernel, its constants and its options."""
    batch, tokens, _, heads, width = qkv.shape
    rows = min(tiling.rows, _power(tokens), 32 if _has_tensor_memory(qkv.device) else tiling.rows)
    tiling = replace(tiling, chunk=min(tiling.chunk, _power(tokens)), rows=rows)
    full, rest = divmod(tokens, tiling.chunk)
    tail = _power(rest) if rest else 0
    if tail == tiling.chunk:
        full, tail = full + 1, 0
    first = _power(width)
    if first > width and first > 16:
        first //= 2
    constants: dict[str, Any] = {
        "T": tokens,
        "H": heads,
        "D": width,
        "D1": first,
        "D2": _power(width - first) if width > first else 0,
        "FULL": full,
        "CHUNK": tiling.chunk,
        "TAIL": tail,
        "ROWS": tiling.rows,
        "HOIST": tiling.hoist,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    if tiling.registers is not None:
        constants["maxnreg"] = tiling.registers
    return (batch * heads,), constants


@functools.cache
def _has_tensor_memory(device: torch.device) -> bool:
    """Whether products of 64 rows or more take tensor memory: on compute capability 10, for which it is too small."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def _power(size: int) -> int:
    """The smallest power of two that is at least `size` and at least 16, which is the smallest side of a product."""
    return max(16, 1 << (size - 1).bit_length())
