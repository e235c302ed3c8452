"""The device stage in Triton kernels; the reference does what they cannot do first.

    uint8 (B, H, W, 3) --(reference: the samples with a blur, up to it)--> prepared
    images, prepared, draws --(column by column, the samples that need it: statistics, neighbours)--> tables, prepared
    images, prepared, tables, draws --(one kernel: one read of each pixel that counts, one write)--> (B, 3, H, W)

The last kernel does operations on a pixel alone, and geometric ones to the nearest pixel: one pass of the batch. Before
it, each operation that needs statistics (contrast, autocontrast, equalize) takes one more read of its sample, to count
levels that are made into a table, and each that needs neighbours (sharpness, bilinear resampling) one more read and
write of uint8. A blur runs in the reference, on its samples alone: one read and write for each column up to the last.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from sdpnet.pipelines import triton_support
from sdpnet.pipelines.augment.reference.geometry import GEOMETRIC, affine_matrices
from sdpnet.pipelines.augment.reference.operations import apply_operations
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import ERASE_MODES, BatchPlan
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["COLUMN", "FIELDS", "finish", "runs_on", "split_draws"]

# A row of draws, int32: FIELDS values, then COLUMN values for each operation. A slot is where the image lies in
# `prepared` before all operations or after this one; -1: nowhere.
FIELDS = 14  # slot, erase box (4), erase key (low, high), mix kind, partner, lambda, mix box (4)
COLUMN = 9  # operation, magnitude, slot, inverse affine matrix (6)

_LEAST_CAPABILITY = (7, 5)  # Triton's own: below it, its compiler fails
_BLOCK = 256  # pixels a program; compiled for 9.0 that takes 46 registers a thread, 69 with noise
_COUNTED_BLOCK, _COUNTED_BLOCKS = 256, 32  # so that a program adds 256 counts for 8,192 pixels
_STATISTICAL = (Operation.CONTRAST, Operation.AUTOCONTRAST, Operation.EQUALIZE)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run there: NVIDIA GPUs of compute capability 7.5 or more, if Triton can be imported."""
    return triton_support.runs_on(device, _LEAST_CAPABILITY, _kernels)


@functools.cache
def _kernels() -> Any:
    """The modules of the kernels, last kernel first, or None without Triton."""
    room = "sdpnet.pipelines.augment.fused"
    return triton_support.import_kernels(f"{room}.finish", f"{room}.neighbours", f"{room}.statistics")


def split_draws(operations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (B, K) -> what the reference must do first, and what the kernels do then; both (B, K), else IDENTITY."""
    unable = operations == Operation.GAUSSIAN_BLUR
    still_to_come = np.cumsum(unable[:, ::-1], axis=1)[:, ::-1] > 0  # this one or a later one
    return np.where(still_to_come, operations, np.uint8(0)), np.where(still_to_come, np.uint8(0), operations)


def finish(
    images: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, options: AugmentOptions, plan: BatchPlan | None
) -> torch.Tensor:
    """Operations, normalisation, erasing and the pixels of MixUp and CutMix; the host does not wait for the device.

    Args:
        images: uint8 (B, H, W, 3).
        scale: float32 (6,) on the images' device: levels times the first three, plus the last three.
        dtype: of the result; the arithmetic is float32.
        plan: None only normalises.

    Returns:
        (B, 3, H, W), channels_last.
    """
    (last, neighbours, statistics), images = _kernels(), images.contiguous()
    batch, height, width, _ = images.shape
    columns = plan.ops.shape[1] if plan is not None and options.randaugment.enabled else 0
    draws_here = torch.zeros((batch, FIELDS + columns * COLUMN), dtype=torch.int32, pin_memory=images.is_cuda)
    draws, then = draws_here.numpy(), np.zeros((batch, 0), np.uint8)
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
            prepared, then = _prepare(images, plan, options, draws)
    draws_there = draws_here.to(images.device, non_blocking=True)
    out = torch.empty((batch, 3, height, width), dtype=dtype, device=images.device, memory_format=torch.channels_last)
    red, green, blue = options.randaugment.fill
    fill = round(red) + 256 * round(green) + 65536 * round(blue)
    tables, counted = images, np.isin(then, _STATISTICAL)  # tables are not read where nothing is counted
    with torch.cuda.device_of(images):
        if counted.any():
            counts = torch.zeros((batch, columns, 3, 256), dtype=torch.int32, device=images.device)
            tables = torch.empty((batch, columns, 3, 256), dtype=torch.uint8, device=images.device)
        for column in range(columns):
            if counted[:, column].any():
                statistics.count_kernel[(-(-height * width // (_COUNTED_BLOCK * _COUNTED_BLOCKS)), batch)](
                    images,
                    prepared,
                    tables,
                    draws_there,
                    counts,
                    column,
                    height,
                    width,
                    fill,
                    COLUMNS=columns,
                    BLOCK=_COUNTED_BLOCK,
                    BLOCKS=_COUNTED_BLOCKS,
                    enable_fp_fusion=False,
                )
                statistics.table_kernel[(3, batch)](
                    draws_there, counts, tables, column, height * width, COLUMNS=columns, enable_fp_fusion=False
                )
            if (draws[:, FIELDS + column * COLUMN + 2] >= 0).any():
                neighbours.neighbour_kernel[(-(-height * width // _BLOCK), batch)](
                    images,
                    prepared,
                    tables,
                    draws_there,
                    column,
                    height,
                    width,
                    fill,
                    red,
                    green,
                    blue,
                    COLUMNS=columns,
                    BLOCK=_BLOCK,
                    enable_fp_fusion=False,
                )
        last.finish_kernel[(-(-height * width // _BLOCK), batch)](
            images,
            prepared,
            tables,
            draws_there,
            scale,
            out,
            height,
            width,
            fill,
            COLUMNS=columns,
            ERASE=erasing,
            MIX=mixing,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
    return out


def _prepare(
    images: torch.Tensor, plan: BatchPlan, options: AugmentOptions, draws: np.ndarray
) -> tuple[torch.Tensor, np.ndarray]:
    """Writes slots and operations into `draws`; what lies in the slots, those of the kernels empty, and the kernels'
    operations."""
    height, width = images.shape[1:3]
    interpolation, fill = options.randaugment.interpolation, options.randaugment.fill
    before, then = split_draws(plan.ops)
    kept = then == Operation.SHARPNESS
    if interpolation == "bilinear":
        kept |= np.isin(then, GEOMETRIC)
    rows = np.flatnonzero(before.any(axis=1))
    draws[rows, 0] = np.arange(len(rows))
    slots = len(rows)
    for k in range(then.shape[1]):
        column = draws[:, FIELDS + k * COLUMN :]
        column[:, 0] = then[:, k]
        column[:, 1] = np.ascontiguousarray(plan.magnitudes[:, k]).view(np.int32)
        column[:, 2] = np.where(kept[:, k], slots + np.cumsum(kept[:, k]) - 1, -1)
        slots += int(kept[:, k].sum())
        moved = np.isin(then[:, k], GEOMETRIC)
        matrices = affine_matrices(then[moved, k], plan.magnitudes[moved, k], height, width)
        column[moved, 3:9] = matrices.reshape(-1, 6).view(np.int32)
    if not slots:
        return images, then
    prepared = torch.empty((slots, 3, height, width), dtype=torch.uint8, device=images.device)
    if len(rows):
        there = torch.from_numpy(rows).to(images.device, non_blocking=True)
        prepared[: len(rows)] = apply_operations(
            images.index_select(0, there).permute(0, 3, 1, 2),
            before[rows],
            plan.magnitudes[rows],
            interpolation=interpolation,
            fill=fill,
        )
    return prepared, then
