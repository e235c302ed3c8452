"""Linear, GELU, Linear with bias, GELU and their gradients in the epilogues of cuBLASLt's matrix products.

    forward   x, W1, b1 -> hidden, GELU(hidden)                    one product (GELU_AUX_BIAS)
    backward  gradient, W2, hidden -> gradient to hidden and b1    one product (DGELU_BGRAD)

PyTorch's other products stay as they are. The library is the one that PyTorch has loaded; it is called by ctypes.
cuBLASLt's GELU is the approximation by tanh: it differs from the exact one by at most 4.8e-4, less than bfloat16 rounds
most values by. So only products in half precision are computed here.

A row-major matrix (rows, columns) is for cuBLASLt a column-major one (columns, rows), so all products here are
transposed: what PyTorch calls x W1^T (rows, hidden) is W1 x^T (hidden, rows). The hidden units are then rows, as the
epilogues with a bias need it.

Source: the documentation of cuBLAS 13 and the headers cublasLt.h, cublas_api.h and library_types.h.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

__all__ = ["linear_gelu_linear", "product", "runs_on"]

_LEAST_CAPABILITY: Final = (8, 0)
_WORKSPACE: Final = 32 << 20  # bytes; what NVIDIA recommends for compute capability 9.0
_CANDIDATES: Final = 8  # algorithms that are asked for; the first one is the fastest by cuBLASLt's estimate
_ALGORITHM = 0  # which of them is used; a benchmark may try the others

# cudaDataType_t, cublasComputeType_t
_TYPES: Final = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_32F: Final = 68
# cublasLtEpilogue_t
EPILOGUES: Final = {"none": 1, "bias": 4, "gelu": 32 | 128 | 4, "gelu backward": 64 | 128 | 16}
# cublasLtMatmulDescAttributes_t: (number, type)
_TRANS_A: Final = (3, ctypes.c_int32)
_TRANS_B: Final = (4, ctypes.c_int32)
_EPILOGUE: Final = (7, ctypes.c_uint32)
_BIAS_POINTER: Final = (8, ctypes.c_void_p)
_AUX_POINTER: Final = (11, ctypes.c_void_p)
_AUX_LD: Final = (12, ctypes.c_int64)
_BIAS_TYPE: Final = (26, ctypes.c_int32)
# cublasLtMatmulPreferenceAttributes_t: number
_MAX_WORKSPACE: Final = 1
_ALIGNMENTS: Final = (5, 6, 7, 8)  # of A, B, C, D


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass
class _Plan:
    """A product whose shapes, dtypes and epilogue are known. The pointers in `description` change with each call."""

    description: ctypes.c_void_p
    layouts: tuple[ctypes.c_void_p, ...]
    algorithms: list[_Heuristic] = field(default_factory=list)


_plans: dict[tuple[Any, ...], _Plan] = {}
_lock = threading.Lock()


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the products run on `device`: an NVIDIA GPU of compute capability 8.0 or more, with cuBLASLt found."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    try:
        library()
    except OSError:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@functools.cache
def library() -> ctypes.CDLL:
    """cuBLASLt: the library that this process has loaded already, else the one that the loader finds.

    Raises:
        OSError: there is none.
    """
    version = (torch.version.cuda or "13").split(".")[0]
    names = [f"libcublasLt.so.{version}", "libcublasLt.so.13", "libcublasLt.so.12"]
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = re.findall(r"/\S*libcublasLt\.so\.\d+", maps.read_text(encoding="utf-8", errors="replace"))
        names = [*loaded, *names]
    error: OSError | None = None
    for name in names:
        try:
            found = ctypes.CDLL(name)
        except OSError as failed:
            error = failed
        else:
            return _declared(found)
    assert error is not None
    raise error


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the arguments of the functions that are used here; without it, ctypes would cut pointers to 32 bits."""
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    to_pointer = ctypes.POINTER(ctypes.c_void_p)
    for name, arguments in {
        "cublasLtCreate": [to_pointer],
        "cublasLtMatmulDescCreate": [to_pointer, number, number],
        "cublasLtMatmulDescSetAttribute": [pointer, number, pointer, size],
        "cublasLtMatrixLayoutCreate": [to_pointer, number, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
        "cublasLtMatmulPreferenceCreate": [to_pointer],
        "cublasLtMatmulPreferenceDestroy": [pointer],
        "cublasLtMatmulPreferenceSetAttribute": [pointer, number, pointer, size],
        "cublasLtMatmulAlgoGetHeuristic": [*[pointer] * 7, number, pointer, ctypes.POINTER(number)],
        "cublasLtMatmul": [*[pointer] * 14, size, pointer],
    }.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, number
    found.cublasLtGetStatusName.argtypes, found.cublasLtGetStatusName.restype = [number], ctypes.c_char_p
    return found


def _call(name: str, *arguments: Any) -> None:
    """Calls a function of cuBLASLt.

    Raises:
        RuntimeError: it returned another status than success.
    """
    status = getattr(library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name}: {library().cublasLtGetStatusName(status).decode()}")


def _created(name: str, *arguments: Any) -> ctypes.c_void_p:
    """The object that a function of cuBLASLt creates."""
    made = ctypes.c_void_p()
    _call(name, ctypes.byref(made), *arguments)
    return made


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    """cuBLASLt's handle for the device with this number, which must be the current one."""
    return _created("cublasLtCreate")


def _set(description: ctypes.c_void_p, attribute: tuple[int, Any], value: int) -> None:
    number, kind = attribute
    content = kind(value)
    _call("cublasLtMatmulDescSetAttribute", description, number, ctypes.byref(content), ctypes.sizeof(content))


def _description(
    epilogue: str, bias: torch.Tensor | None, aux: torch.Tensor | None, *, transposed: bool
) -> ctypes.c_void_p:
    description = _created("cublasLtMatmulDescCreate", _COMPUTE_32F, _TYPES[torch.float32])
    _set(description, _TRANS_A, int(transposed))
    _set(description, _TRANS_B, 0)
    _set(description, _EPILOGUE, EPILOGUES[epilogue])
    if bias is not None:
        _set(description, _BIAS_TYPE, _TYPES[bias.dtype])
    if aux is not None:
        _set(description, _AUX_LD, aux.shape[-1])
    _point(description, bias, aux)
    return description


def _point(description: ctypes.c_void_p, bias: torch.Tensor | None, aux: torch.Tensor | None) -> None:
    if bias is not None:
        _set(description, _BIAS_POINTER, bias.data_ptr())
    if aux is not None:
        _set(description, _AUX_POINTER, aux.data_ptr())


def _layout(matrix: torch.Tensor) -> ctypes.c_void_p:
    """The layout of a contiguous row-major matrix (rows, columns), which is the column-major (columns, rows)."""
    rows, columns = matrix.shape
    return _created("cublasLtMatrixLayoutCreate", _TYPES[matrix.dtype], columns, rows, columns)


def _alignment(tensor: torch.Tensor) -> int:
    """The largest power of two, up to 256, that divides the address."""
    address = tensor.data_ptr()
    return min(address & -address, 256) if address else 256


def _algorithms(description: ctypes.c_void_p, matrices: tuple[torch.Tensor, ...], plan: _Plan) -> list[_Heuristic]:
    """What cuBLASLt thinks are the fastest algorithms for a product, the fastest one first."""
    preference = _created("cublasLtMatmulPreferenceCreate")
    try:
        for number, content in (
            (_MAX_WORKSPACE, ctypes.c_uint64(_WORKSPACE)),
            *((n, ctypes.c_uint32(_alignment(m))) for n, m in zip(_ALIGNMENTS, matrices, strict=True)),
        ):
            size = ctypes.sizeof(content)
            _call("cublasLtMatmulPreferenceSetAttribute", preference, number, ctypes.byref(content), size)
        found, count = (_Heuristic * _CANDIDATES)(), ctypes.c_int()
        _call(
            "cublasLtMatmulAlgoGetHeuristic",
            _handle(matrices[0].device.index),
            description,
            *plan.layouts,
            preference,
            _CANDIDATES,
            found,
            ctypes.byref(count),
        )
    finally:
        _call("cublasLtMatmulPreferenceDestroy", preference)
    able = [result for result in found[: count.value] if result.state == 0]
    if not able:
        raise RuntimeError("cublasLtMatmulAlgoGetHeuristic: no algorithm for this product")
    return able


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    epilogue: str = "none",
    bias: torch.Tensor | None = None,
    aux: torch.Tensor | None = None,
    *,
    transposed: bool,
) -> torch.Tensor:
    """b a^T with `transposed`, else b a, and an epilogue.

    All tensors are contiguous and of the same dtype, float16 or bfloat16, on one GPU. The number of columns of each
    matrix is a multiple of 8.

    Args:
        a: (columns, k) with `transposed`, else (k, columns).
        b: (rows, k).
        epilogue: `none`; `bias`; `gelu`: the result is GELU(product + bias), and product + bias is written to `aux`;
            `gelu backward`: the result is the product times GELU's derivative at `aux`, and the sums of its columns are
            written to `bias`.
        bias: (columns,).
        aux: (rows, columns).

    Returns:
        (rows, columns).

    Raises:
        RuntimeError: cuBLASLt refuses; the message names the call and the status.
    """
    out = b.new_empty((len(b), len(a) if transposed else a.shape[1]))
    if not out.numel():
        return out
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    matrices = (a, b, out, out)
    extras = [tensor for tensor in (bias, aux) if tensor is not None]
    alignments = tuple(_alignment(tensor) for tensor in (*matrices, *extras))
    key = (b.device.index, epilogue, transposed, b.dtype, tuple(a.shape), len(b), alignments)
    with torch.cuda.device_of(b), _lock:
        plan = _plans.get(key)
        if plan is None:
            description = _description(epilogue, bias, aux, transposed=transposed)
            plan = _Plan(description, tuple(_layout(matrix) for matrix in matrices))
            plan.algorithms = _algorithms(description, matrices, plan)
            _plans[key] = plan
        else:
            _point(plan.description, bias, aux)
        chosen = plan.algorithms[min(_ALGORITHM, len(plan.algorithms) - 1)]
        # Memory of the current stream: it is used again only after this product.
        workspace = torch.empty(chosen.workspace_size, dtype=torch.uint8, device=b.device)
        layout_a, layout_b, layout_c, layout_d = plan.layouts
        _call(
            "cublasLtMatmul",
            _handle(b.device.index),
            plan.description,
            ctypes.byref(one),
            a.data_ptr(),
            layout_a,
            b.data_ptr(),
            layout_b,
            ctypes.byref(zero),
            out.data_ptr(),
            layout_c,
            out.data_ptr(),
            layout_d,
            ctypes.byref(chosen.algo),
            workspace.data_ptr() or None,
            chosen.workspace_size,
            torch.cuda.current_stream(b.device).cuda_stream,
        )
    return out


def linear_gelu_linear(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """Linear, GELU (approximated by tanh), Linear: (..., dim) -> (..., out).

    Args:
        x: (..., dim). Autocast applies to it and to the others; all are float16 or bfloat16 then.
        weight1: (hidden, dim), with dim and hidden multiples of 8.
        bias1: (hidden,).
        weight2: (out, hidden), with out a multiple of 8.
        bias2: (out,).
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    matrix, *others = (tensor.to(dtype) for tensor in (x.flatten(0, -2), weight1, bias1, weight2, bias2))
    return _forward(matrix, *others)[0].view(*x.shape[:-1], len(bias2))


@torch.library.custom_op("sdpnet::linear_gelu_linear", mutates_args=())
def _forward(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result (rows, out), and for the backward pass: the hidden layer before and after GELU, (rows, hidden)."""
    hidden = x.new_empty((len(x), len(weight1)))
    active = product(weight1.contiguous(), x.contiguous(), "gelu", bias1.contiguous(), hidden, transposed=True)
    return torch.addmm(bias2, active, weight2.t()), hidden, active


@_forward.register_fake
def _(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = x.new_empty((len(x), len(weight1)))
    return x.new_empty((len(x), len(weight2))), hidden, torch.empty_like(hidden)


@torch.library.custom_op("sdpnet::gelu_backward_product", mutates_args=())
def _gelu_backward(
    gradient: torch.Tensor, weight2: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients to the hidden layer before GELU (rows, hidden) and to its bias (hidden,)."""
    grad_bias = hidden.new_zeros(hidden.shape[1])
    grad_hidden = product(
        weight2.contiguous(), gradient.contiguous(), "gelu backward", grad_bias, hidden.contiguous(), transposed=False
    )
    return grad_hidden, grad_bias


@_gelu_backward.register_fake
def _(gradient: torch.Tensor, weight2: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(hidden.shape[1])


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight1, _, weight2, _ = inputs
    ctx.save_for_backward(x, weight1, weight2, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise torch would allocate zeros as the gradients of the hidden layer


def _differentiate(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    x, weight1, weight2, hidden, active = ctx.saved_tensors
    grad_hidden, grad_bias1 = _gelu_backward(gradient, weight2, hidden)
    grad_bias2 = gradient.sum(0, dtype=torch.float32).to(gradient.dtype)
    return grad_hidden @ weight1, grad_hidden.t() @ x, grad_bias1, gradient.t() @ active, grad_bias2


_forward.register_autograd(_differentiate, setup_context=_save)
