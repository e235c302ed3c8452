"""Decides which images are mixed, and how: MixUp (Zhang et al., 2017) and CutMix (Yun et al., 2019)."""

from __future__ import annotations

from typing import Final

import numpy as np

from sdpnet.pipelines.planning.draws import beta_quantile, uniforms
from sdpnet.pipelines.planning.options import MixOptions

__all__ = ["MIX_CUTMIX", "MIX_MIXUP", "MIX_NONE", "MixOptions", "draw_mixes"]

MIX_NONE: Final = 0
MIX_MIXUP: Final = 1
MIX_CUTMIX: Final = 2


def draw_mixes(mix: MixOptions, key: int, ids: np.ndarray, image_size: int) -> dict[str, np.ndarray]:
    """Draws the `mix_*` arrays of a `BatchPlan` for all samples of a global batch.

    Args:
        mix: the settings.
        key: the key of the draws, from `derive_seed`.
        ids: int64 (B,), sample ids.
        image_size: output pixels a side.
    """
    # Samples 2k and 2k + 1 of the global batch are each other's partners. With an even batch per rank, both are on the
    # same rank at any world size. In a random order, a neighbour is a random sample.
    u = uniforms(key, ids, 5)
    partners = np.arange(len(ids)) ^ 1
    partners[partners >= len(ids)] = len(ids) - 1
    cut_share = 0.0 if mix.cutmix_alpha <= 0 else 1.0 if mix.mixup_alpha <= 0 else mix.switch_probability
    kinds = np.where(u[:, 1] < cut_share, MIX_CUTMIX, MIX_MIXUP).astype(np.uint8)
    kinds[(u[:, 0] >= mix.probability) | (partners == np.arange(len(ids)))] = MIX_NONE
    lambdas = np.ones(len(ids))
    boxes = np.zeros((len(ids), 4), np.int64)
    up, cut = kinds == MIX_MIXUP, kinds == MIX_CUTMIX
    if up.any():
        lambdas[up] = beta_quantile(u[up, 2], mix.mixup_alpha)
    if cut.any():
        # Yun et al., appendix A: the box has the image's aspect ratio, its centre is uniform, and it is clipped at the
        # borders. The label's weight follows from the clipped box.
        half = np.sqrt(1 - beta_quantile(u[cut, 2], mix.cutmix_alpha)) * image_size
        half = half.astype(np.int64) // 2
        centre = (u[cut, 3:5] * image_size).astype(np.int64)
        low = np.clip(centre - half[:, None], 0, image_size)
        extent = np.clip(centre + half[:, None], 0, image_size) - low
        boxes[cut] = np.concatenate([low, extent], axis=1)
        lambdas[cut] = 1 - extent.prod(axis=1) / image_size**2
    return {
        "mix_kinds": kinds,
        "mix_partners": partners,
        "mix_lambdas": lambdas.astype(np.float32),
        "mix_boxes": boxes.astype(np.int32),
    }
