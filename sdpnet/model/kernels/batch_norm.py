"""Batch normalisation of channels_last images in training, with GELU before it and a residual sum after it, in Triton.

The functions are the parts of a conv block's passes; autograd does not see them. Images are channels_last
(B, dim, H, W), all in one of float32, float16 and bfloat16; weights and biases are (dim,). `statistics` are float32
(3, dim): mean, 1 / sqrt(variance + eps) and the biased variance. `factor` holds a factor for each sample, or is None
for ones. With `gelu`, GELU is applied to the values before they are normalised.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch

from sdpnet.pipelines import triton_support

__all__ = ["gradient_sums", "normalise", "normalise_backward", "write_statistics"]

# Of the kernels that go through all rows: rows and channels of a tile, warps, and the number of programs.
_ROWS: Final = 16
_CHANNELS: Final = 128
_WARPS: Final = 4
_PROGRAMS: Final = 1056
_FINISHED: Final = {"PROGRAMS": 64, "CHANNELS": 32}  # the tile of the kernel that sums over programs


@functools.cache
def _kernels() -> Any:
    modules = triton_support.import_kernels("sdpnet.model.kernels.batch_norm_kernel")
    return None if modules is None else modules[0]


def _grid(image: torch.Tensor) -> tuple[int, int, int, tuple[int], dict[str, Any]]:
    """The number of rows, rows of a program, programs for each block of channels, the grid, and the constants."""
    dim, num_rows = image.shape[1], image.numel() // image.shape[1]
    blocks = -(-dim // _CHANNELS)
    tiles = -(-num_rows // _ROWS)
    rows_per_program = -(-tiles // max(1, _PROGRAMS // blocks)) * _ROWS
    programs = -(-num_rows // rows_per_program)
    constants = {"DIM": dim, "ROWS": _ROWS, "CHANNELS": _CHANNELS, "num_warps": _WARPS, "enable_fp_fusion": True}
    return num_rows, rows_per_program, programs, (blocks * programs,), constants


def write_statistics(values: torch.Tensor, statistics: torch.Tensor, eps: float, *, gelu: bool) -> None:
    """Writes mean, 1 / deviation and variance of the channels, of GELU(values) with `gelu`, to `statistics`."""
    dim, (num_rows, rows_per_program, programs, grid, constants) = values.shape[1], _grid(values)
    partial = torch.empty((programs, 2, dim), dtype=torch.float32, device=values.device)
    _kernels().batch_norm_statistics_kernel[grid](values, partial, num_rows, rows_per_program, GELU=gelu, **constants)
    finish = (-(-dim // _FINISHED["CHANNELS"]),)
    _kernels().batch_norm_finish_kernel[finish](
        values, partial, statistics, num_rows, programs, eps, GELU=gelu, DIM=dim, **_FINISHED
    )


def normalise(
    values: torch.Tensor,
    residual: torch.Tensor | None,
    factor: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    gelu: bool,
) -> torch.Tensor:
    """residual + factor * BN(values); without `residual`, the sum is not computed."""
    num_rows, rows_per_program, _, grid, constants = _grid(values)
    out = torch.empty_like(values)
    _kernels().batch_norm_apply_kernel[grid](
        values,
        values if residual is None else residual,
        weight if factor is None else factor,
        statistics,
        weight,
        bias,
        out,
        num_rows,
        rows_per_program,
        values.shape[2] * values.shape[3],
        GELU=gelu,
        RESIDUAL=residual is not None,
        FACTOR=factor is not None,
        **constants,
    )
    return out


def gradient_sums(
    gradient: torch.Tensor, values: torch.Tensor, factor: torch.Tensor | None, statistics: torch.Tensor, *, gelu: bool
) -> torch.Tensor:
    """The gradients to a norm's bias and weight, float32 (2, dim)."""
    num_rows, rows_per_program, programs, grid, constants = _grid(values)
    partial = torch.empty((programs, 2, values.shape[1]), dtype=torch.float32, device=values.device)
    _kernels().batch_norm_sums_kernel[grid](
        gradient,
        values,
        statistics if factor is None else factor,
        statistics,
        partial,
        num_rows,
        rows_per_program,
        values.shape[2] * values.shape[3],
        GELU=gelu,
        FACTOR=factor is not None,
        **constants,
    )
    return partial.sum(dim=0)


def normalise_backward(
    gradient: torch.Tensor,
    values: torch.Tensor,
    factor: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    *,
    gelu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient to `values` and, with `gelu`, its sums over the pixels, float32 (dim,)."""
    num_rows, rows_per_program, programs, grid, constants = _grid(values)
    partial = torch.empty((programs if gelu else 0, values.shape[1]), dtype=torch.float32, device=values.device)
    out = torch.empty_like(values)
    _kernels().batch_norm_backward_kernel[grid](
        gradient,
        values,
        statistics if factor is None else factor,
        statistics,
        weight,
        sums,
        out,
        partial,
        num_rows,
        rows_per_program,
        values.shape[2] * values.shape[3],
        GELU=gelu,
        FACTOR=factor is not None,
        **constants,
    )
    return out, partial.sum(dim=0)
