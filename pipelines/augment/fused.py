"""The device stage in one Triton kernel, where the draws allow it; the reference does the rest first.

    uint8 (B, H, W, 3) --(reference: the samples with an operation that the kernel does not do, up to it)--> prepared
    images, prepared, draws --(one kernel: one read of each pixel that counts, one write)--> (B, 3, H, W) for the model

The kernel does operations on a pixel alone and, to the nearest pixel, geometric ones: one pass of the batch. Operations
that need statistics (contrast, autocontrast, equalize) or neighbours (sharpness, blur, bilinear resampling) run in the
reference, on their samples alone: one more read and write of uint8 for each column up to the sample's last of these.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from pipelines.augment.geometry import GEOMETRIC, affine_matrices
from pipelines.augment.operations import apply_operations
from pipelines.contract import AugmentOptions
from pipelines.plan import ERASE_MODES, BatchPlan
from pipelines.policies import Operation

__all__ = ["finish", "runs_on", "split_draws"]

_LEAST_CAPABILITY = (7, 5)  # Triton's own: below it, its compiler fails
_BLOCK = 256  # pixels a program; compiled for 9.0 that takes 40 registers a thread (64 with noise), 1,024 took 165
_POINTWISE = (
    Operation.IDENTITY,
    Operation.BRIGHTNESS,
    Operation.COLOUR,
    Operation.POSTERIZE,
    Operation.SOLARIZE,
    Operation.INVERT,
    Operation.SOLARIZE_ADD,
    Operation.GREYSCALE,
)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel can run there: an NVIDIA GPU of compute capability 7.5 or more, and Triton can be imported."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY and _kernel() is not None


@functools.cache
def _kernel() -> Any:
    """The module of the kernel, or None without Triton."""
    try:
        from pipelines.augment import fused_kernel
    except ImportError:
        return None
    return fused_kernel


def split_draws(operations: np.ndarray, interpolation: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (B, K) -> what the reference must do first, and what the kernel does then; both (B, K), else IDENTITY."""
    able = (*_POINTWISE, *GEOMETRIC) if interpolation == "nearest" else _POINTWISE
    unable = ~np.isin(operations, able)
    still_to_come = np.cumsum(unable[:, ::-1], axis=1)[:, ::-1] > 0  # this one or a later one
    return np.where(still_to_come, operations, np.uint8(0)), np.where(still_to_come, np.uint8(0), operations)


def finish(
    images: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, options: AugmentOptions, plan: BatchPlan | None
) -> torch.Tensor:
    """Operations, normalisation, erasing and the pixels of MixUp and CutMix.

    Args:
        images: uint8 (B, H, W, 3).
        scale: float32 (6,) on the images' device: levels times the first three, plus the last three.
        dtype: of the result; the arithmetic is float32.
        plan: None only normalises.

    Returns:
        (B, 3, H, W), channels_last.
    """
    kernel, images = _kernel(), images.contiguous()
    batch, height, width, _ = images.shape
    columns = plan.ops.shape[1] if plan is not None and options.randaugment.enabled else 0
    draws = np.zeros((batch, kernel.FIELDS + columns * kernel.COLUMN), np.int32)
    draws[:, 0] = -1
    prepared, erasing, mixing = images, -1, False
    if plan is not None:
        erasing = ERASE_MODES.index(options.erase.mode) if options.erase.probability > 0 else -1
        mixing = options.mix.enabled
        draws[:, 1:5] = plan.erase_boxes
        draws[:, 5:7] = np.ascontiguousarray(plan.erase_keys).view(np.int32).reshape(-1, 2)
        draws[:, 7] = plan.mix_kinds
        draws[:, 8] = plan.mix_partners
        draws[:, 9] = np.ascontiguousarray(plan.mix_lambdas).view(np.int32)
        draws[:, 10:14] = plan.mix_boxes
        if columns:
            prepared = _prepare(images, plan, options, draws, kernel)
    draws_there = torch.from_numpy(draws).to(images.device, non_blocking=True)
    out = torch.empty((batch, 3, height, width), dtype=dtype, device=images.device, memory_format=torch.channels_last)
    red, green, blue = (round(level) for level in options.randaugment.fill)
    with torch.cuda.device_of(images):
        kernel.finish_kernel[(-(-height * width // _BLOCK), batch)](
            images,
            prepared,
            draws_there,
            scale,
            out,
            height,
            width,
            red + 256 * green + 65536 * blue,
            COLUMNS=columns,
            ERASE=erasing,
            MIX=mixing,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
    return out


def _prepare(
    images: torch.Tensor, plan: BatchPlan, options: AugmentOptions, draws: np.ndarray, kernel: Any
) -> torch.Tensor:
    """Writes slots and operations into `draws`; the images that the reference had to operate on, or all as they are."""
    height, width = images.shape[1:3]
    interpolation, fill = options.randaugment.interpolation, options.randaugment.fill
    before, then = split_draws(plan.ops, interpolation)
    for k in range(then.shape[1]):
        column = draws[:, kernel.FIELDS + k * kernel.COLUMN :]
        column[:, 0] = then[:, k]
        column[:, 1] = np.ascontiguousarray(plan.magnitudes[:, k]).view(np.int32)
        moved = np.isin(then[:, k], GEOMETRIC)
        matrices = affine_matrices(then[moved, k], plan.magnitudes[moved, k], height, width)
        column[moved, 2:8] = matrices.reshape(-1, 6).view(np.int32)
    rows = np.flatnonzero(before.any(axis=1))
    if not len(rows):
        return images
    draws[rows, 0] = np.arange(len(rows))
    there = torch.from_numpy(rows).to(images.device, non_blocking=True)
    return apply_operations(
        images.index_select(0, there).permute(0, 3, 1, 2),
        before[rows],
        plan.magnitudes[rows],
        interpolation=interpolation,
        fill=fill,
    )
