"""Launches the device stage's Triton kernels.

    uint8 (B, H, W, 3) --(reference: samples with a blur, up to and including it)--> prepared
    images, prepared, draws --(column by column, samples that need it: statistics, neighbours)--> tables, prepared
    images, prepared, tables, draws --(one kernel: one read per pixel, one write)--> (B, 3, H, W)

The last kernel applies operations on single pixels and geometric operations to the nearest pixel, in one pass over the
batch. Before it, each operation that needs statistics (contrast, autocontrast, equalize) reads its sample once more to
count levels, and each operation that needs neighbours (sharpness, bilinear resampling) reads and writes its sample once
more as uint8. The kernels have no blur: samples with one go through the PyTorch reference first, up to their last blur.
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

# One row of draws per sample, int32: FIELDS values, then COLUMN values for each operation. Floats are stored bit by
# bit. The first slot is the index in `prepared` of the image before all operations, an operation's slot that of the
# image after it; -1 means that `prepared` does not hold it.
#
# The last field is not the sample's own: row n has the number of the n-th sample that is the first of a pair or mixed
# with no sample that is mixed with it.
FIELDS = 15  # slot, erase box (4), erase key (low, high), mix kind, partner, lambda, mix box (4), first of a pair
COLUMN = 9  # operation, magnitude, slot, inverse affine matrix (6)

_MIN_CAPABILITY = (7, 5)  # Triton 3.6 and 3.8 also compile the kernels for 7.0, but they were never run there
_BLOCK = 256  # pixels per program; compiled for capability 9.0 that takes 56 registers a thread, 62 with noise
_WARPS, _COUNT_WARPS = 4, 4
_COUNT_BLOCK, _COUNT_BLOCKS = 256, 8  # a program adds 256 counts per channel for 2,048 pixels


def _among(operations: tuple[Operation, ...]) -> np.ndarray:
    """A table, bool (256,): whether a number is one of these operations. `np.isin` took a fifth of the host's work."""
    table = np.zeros(256, bool)
    table[list(operations)] = True
    return table


_STATISTICAL = _among((Operation.CONTRAST, Operation.AUTOCONTRAST, Operation.EQUALIZE))
_GEOMETRIC, _SHARPNESS = _among(GEOMETRIC), _among((Operation.SHARPNESS,))


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels can run on a device: NVIDIA GPUs of compute capability 7.5 or more, with Triton installed."""
    return triton_support.runs_on(device, _MIN_CAPABILITY, _kernels)


@functools.cache
def _kernels() -> Any:
    """The modules `finish`, `neighbours` and `statistics`, or None if Triton is not installed."""
    package = "sdpnet.pipelines.augment.fused"
    return triton_support.import_kernels(f"{package}.finish", f"{package}.neighbours", f"{package}.statistics")


def split_draws(operations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits operations, uint8 (B, K), into those that the reference applies first and those of the kernels.

    Both results are (B, K), with IDENTITY in the places of the other one. The reference takes each sample's operations
    up to its last blur, since the order of operations must stay.
    """
    unsupported = operations == Operation.GAUSSIAN_BLUR
    not_yet_last = np.cumsum(unsupported[:, ::-1], axis=1)[:, ::-1] > 0  # this operation or a later one is a blur
    return np.where(not_yet_last, operations, np.uint8(0)), np.where(not_yet_last, np.uint8(0), operations)


def finish(
    images: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, options: AugmentOptions, plan: BatchPlan | None
) -> torch.Tensor:
    """Applies operations, normalises, erases, and mixes the pixels of MixUp and CutMix.

    The host does not wait for the device.

    Args:
        images: uint8 (B, H, W, 3).
        scale: float32 (6,) on the images' device: the factors of red, green and blue levels, then the addends.
        dtype: the result's dtype; the arithmetic is float32.
        options: the augmentation's settings.
        plan: the draws of the batch, or None to normalise only.

    Returns:
        (B, 3, H, W), channels_last.
    """
    # All launches turn off the contraction of products and sums to FMA (`enable_fp_fusion=False`): a level that falls
    # on the other side of a threshold would be carried on by the operations after it, and the reference rounds twice.
    (last, neighbours, statistics), images = _kernels(), images.contiguous()
    batch, height, width, _ = images.shape
    columns = plan.ops.shape[1] if plan is not None and options.randaugment.enabled else 0
    # All draws of the batch travel in one pinned tensor: one copy, for which the host does not wait.
    draws_on_host = torch.zeros((batch, FIELDS + columns * COLUMN), dtype=torch.int32, pin_memory=images.is_cuda)
    draws, kernel_ops = draws_on_host.numpy(), np.zeros((batch, 0), np.uint8)
    draws[:, 0] = -1
    prepared, erasing, mixing, samples = images, -1, False, batch
    if plan is not None:
        erasing = ERASE_MODES.index(options.erase.mode) if options.erase.probability > 0 else -1
        mixing = options.mix.enabled
        draws[:, 1:5] = plan.erase_boxes
        draws[:, 5:7] = np.ascontiguousarray(plan.erase_keys).view(np.int32).reshape(-1, 2)
        draws[:, 7] = plan.mix_kinds
        draws[:, 8] = plan.mix_partners
        draws[:, 9] = np.ascontiguousarray(plan.mix_lambdas).view(np.int32)
        draws[:, 10:14] = plan.mix_boxes
        if mixing:
            own, partners = np.arange(batch), plan.mix_partners
            firsts = np.flatnonzero((partners >= own) | (partners[partners] != own))
            draws[: len(firsts), 14] = firsts
            samples = len(firsts)
        if columns:
            prepared, kernel_ops = _prepare(images, plan, options, draws)
    draws_on_device = draws_on_host.to(images.device, non_blocking=True)
    out = torch.empty((batch, 3, height, width), dtype=dtype, device=images.device, memory_format=torch.channels_last)
    red, green, blue = options.randaugment.fill
    fill = round(red) + 256 * round(green) + 65536 * round(blue)
    tables, counted = images, _STATISTICAL[kernel_ops]  # where nothing is counted, tables are not read
    with torch.cuda.device_of(images):
        if counted.any():
            counts = torch.zeros((batch, columns, 3, 256), dtype=torch.int32, device=images.device)
            tables = torch.empty((batch, columns, 3, 256), dtype=torch.uint8, device=images.device)
        for column in range(columns):
            if counted[:, column].any():
                statistics.count_kernel[(-(-height * width // (_COUNT_BLOCK * _COUNT_BLOCKS)), batch)](
                    images,
                    prepared,
                    tables,
                    draws_on_device,
                    counts,
                    column,
                    height,
                    width,
                    fill,
                    COLUMNS=columns,
                    BLOCK=_COUNT_BLOCK,
                    BLOCKS=_COUNT_BLOCKS,
                    num_warps=_COUNT_WARPS,
                    enable_fp_fusion=False,
                )
                statistics.table_kernel[(3, batch)](
                    draws_on_device, counts, tables, column, height * width, COLUMNS=columns, enable_fp_fusion=False
                )
            if (draws[:, FIELDS + column * COLUMN + 2] >= 0).any():
                neighbours.neighbour_kernel[(-(-height * width // _BLOCK), batch)](
                    images,
                    prepared,
                    tables,
                    draws_on_device,
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
        last.finish_kernel[(-(-height * width // _BLOCK), samples)](
            images,
            prepared,
            tables,
            draws_on_device,
            scale,
            out,
            height,
            width,
            fill,
            COLUMNS=columns,
            ERASE=erasing,
            MIX=mixing,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return out


def _prepare(
    images: torch.Tensor, plan: BatchPlan, options: AugmentOptions, draws: np.ndarray
) -> tuple[torch.Tensor, np.ndarray]:
    """Writes slots and operations into `draws`, and runs the reference's part.

    Returns:
        the prepared images, uint8 (slots, 3, H, W), in which the kernels' slots are still empty, and the operations
        that are left to the kernels, uint8 (B, K).
    """
    height, width = images.shape[1:3]
    interpolation, fill = options.randaugment.interpolation, options.randaugment.fill
    reference_ops, kernel_ops = split_draws(plan.ops)
    has_slot = (_SHARPNESS | _GEOMETRIC if interpolation == "bilinear" else _SHARPNESS)[kernel_ops]
    rows = np.flatnonzero(reference_ops.any(axis=1))
    draws[rows, 0] = np.arange(len(rows))
    slots = len(rows) + int(has_slot.sum())
    # One pass for all columns: this runs in the thread that launches the step's kernels.
    columns = draws[:, FIELDS:].reshape(*kernel_ops.shape, COLUMN)
    columns[..., 0] = kernel_ops
    columns[..., 1] = np.ascontiguousarray(plan.magnitudes).view(np.int32)
    columns[..., 2] = np.where(has_slot, len(rows) - 1 + np.cumsum(has_slot.T).reshape(has_slot.T.shape).T, -1)
    moved = _GEOMETRIC[kernel_ops]
    matrices = affine_matrices(kernel_ops[moved], plan.magnitudes[moved], height, width)
    columns[moved, 3:9] = matrices.reshape(-1, 6).view(np.int32)
    if not slots:
        return images, kernel_ops
    prepared = torch.empty((slots, 3, height, width), dtype=torch.uint8, device=images.device)
    if len(rows):
        rows_on_device = torch.from_numpy(rows).to(images.device, non_blocking=True)
        prepared[: len(rows)] = apply_operations(
            images.index_select(0, rows_on_device).permute(0, 3, 1, 2),
            reference_ops[rows],
            plan.magnitudes[rows],
            interpolation=interpolation,
            fill=fill,
        )
    return prepared, kernel_ops
