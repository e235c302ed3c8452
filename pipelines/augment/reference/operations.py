"""Applies the plan's operations to a batch: each kind of operation runs once, on all samples that drew it.

    uint8 (B, 3, H, W) --(column 0 of the draws)--> ... --(column K - 1)--> uint8 (B, 3, H, W)

Images are planes, not interleaved pixels, so that grey levels, histograms and neighbourhoods read contiguous memory.
The host knows from the plan which samples drew what, so nothing waits for the device. Two geometric operations that
follow each other stay two passes, because rounding twice to the nearest pixel differs from rounding once.
"""

from __future__ import annotations

import numpy as np
import torch

from sdpnet.pipelines.augment.reference.filters import FILTERS
from sdpnet.pipelines.augment.reference.geometry import GEOMETRIC, affine_matrices, resample
from sdpnet.pipelines.augment.reference.levels import LEVELS
from sdpnet.pipelines.planning.policies import Operation

__all__ = ["apply_operations", "pieces"]

_PIECE = 16  # images that a CPU works on at once: they stay in its cache, and malloc reuses their memory

_BY_LEVEL_OR_NEIGHBOURS = {**LEVELS, **FILTERS}


def pieces(count: int, size: int, device: torch.device) -> list[np.ndarray]:
    """Splits the indices 0 to `count` - 1 into int64 arrays of what is processed at once.

    On a CPU that is `size` indices, on a GPU all of them.
    """
    step = size if device.type == "cpu" else max(count, 1)
    return [np.arange(start, min(start + step, count)) for start in range(0, count, step)]


def apply_operations(
    images: torch.Tensor,
    operations: np.ndarray,
    magnitudes: np.ndarray,
    *,
    interpolation: str = "nearest",
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> torch.Tensor:
    """Applies each sample's operations in order, as `torchvision.transforms.v2.functional` would one by one.

    Args:
        images: uint8 (B, 3, H, W), RGB, of any strides; not changed.
        operations: uint8 (B, K), numbers of `sdpnet.pipelines.planning.policies.Operation`.
        magnitudes: float32 (B, K), in each operation's unit.
        interpolation: "nearest" or "bilinear", for the geometric operations.
        fill: RGB levels, 0 to 255, of pixels that the geometric operations leave uncovered.

    Returns:
        uint8 (B, 3, H, W), contiguous.
    """

    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for rows in pieces(len(images), _PIECE, images.device):
        part = slice(rows[0], rows[-1] + 1)
        out[part] = _apply(images[part], operations[part], magnitudes[part], interpolation, fill)
    return out


def _apply(
    images: torch.Tensor,
    operations: np.ndarray,
    magnitudes: np.ndarray,
    interpolation: str,
    fill: tuple[float, float, float],
) -> torch.Tensor:
    def send(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(images.device, non_blocking=True)

    height, width = images.shape[2:]
    images = images.contiguous()
    for kinds, strengths in zip(operations.T, magnitudes.T, strict=True):
        kept = np.flatnonzero(kinds == Operation.IDENTITY)
        parts, changed = [kept], [images.index_select(0, send(kept))]
        moved = np.flatnonzero(np.isin(kinds, GEOMETRIC))
        if len(moved):
            parts.append(moved)
            matrices = send(affine_matrices(kinds[moved], strengths[moved], height, width))
            changed.append(resample(images.index_select(0, send(moved)), matrices, interpolation, fill))
        for kind, function in _BY_LEVEL_OR_NEIGHBOURS.items():
            drawn = np.flatnonzero(kinds == kind)
            if len(drawn):
                parts.append(drawn)
                values = send(strengths[drawn].astype(np.float64))
                changed.append(function(images.index_select(0, send(drawn)), values))
        # The parts are joined and put back in order by whole images, because writing into rows of uint8 (index_copy_)
        # took 10 times as long on a CPU.
        images = torch.cat(changed).index_select(0, send(np.argsort(np.concatenate(parts))))
    return images
