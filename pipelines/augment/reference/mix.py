"""MixUp (Zhang et al., 2017) and CutMix (Yun et al., 2019), per sample, as one weighted sum with the partner."""

from __future__ import annotations

import numpy as np
import torch

from sdpnet.pipelines.augment.reference.box_masks import outside_boxes
from sdpnet.pipelines.plan import MIX_CUTMIX, MIX_MIXUP

__all__ = ["mix", "mix_targets", "soft_targets"]


def mix(
    images: torch.Tensor,
    partners: torch.Tensor,
    kinds: torch.Tensor,
    lambdas: torch.Tensor,
    boxes: torch.Tensor,
) -> torch.Tensor:
    """Mixes every image with its partner. `mix_targets` mixes the targets.

    Args:
        images: float (B, C, H, W). Changed in place.
        partners: float (B, C, H, W), the image that is mixed into each. Overwritten.
        kinds: uint8 (B,), one of `sdpnet.pipelines.plan.MIX_*`.
        lambdas: float32 (B,), the image's own weight in MixUp.
        boxes: int32 (B, 4), CutMix's region (top, left, height, width), whose pixels come from the partner.

    Returns:
        `images`.
    """
    own = torch.where(kinds == MIX_MIXUP, lambdas, 1.0).view(-1, 1, 1, 1)
    cut = boxes * (kinds == MIX_CUTMIX).view(-1, 1)  # a box of height 0 covers nothing
    weights = outside_boxes(cut, *images.shape[2:]).mul_(own).to(images.dtype)
    return images.mul_(weights).add_(partners.mul_(weights.neg_().add_(1)))


def mix_targets(targets: torch.Tensor, partners: torch.Tensor, lambdas: torch.Tensor) -> torch.Tensor:
    """Mixes targets, float (B, num_classes), with those of their partners.

    Args:
        targets: float (B, num_classes).
        partners: int64 (B,), the index of each sample's partner.
        lambdas: float32 (B,), the weight of the sample's own target.
    """
    own = lambdas.view(-1, 1).to(targets.dtype)
    return targets * own + targets[partners] * (1 - own)


def soft_targets(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Turns labels, int64 (B,), into targets, float32 (B, num_classes). Labels of this shape already are targets.

    `smoothing` is label smoothing as in Szegedy et al., 2016, and in `torch.nn.CrossEntropyLoss`.
    """
    if labels.ndim == 2:
        return labels
    own, others = 1 - smoothing + smoothing / num_classes, smoothing / num_classes
    if labels.device.type == "cpu":
        # numpy uses one thread. torch's would wait for cores that decode: 6 % of all processor time (records/LOG.md).
        rows = np.full((len(labels), num_classes), others, np.float32)
        rows[np.arange(len(labels)), labels.numpy()] = own
        return torch.from_numpy(rows)
    targets = torch.full((len(labels), num_classes), others, device=labels.device)
    return targets.scatter_(1, labels.view(-1, 1), own)
