"""The training loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from sdpnet.config.options import LossOptions

__all__ = ["make_loss", "soft_binary_cross_entropy", "soft_cross_entropy"]


def make_loss(options: LossOptions) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss function that `options` names. It takes logits and soft targets, both (B, num_classes)."""
    if options.kind == "ce":
        return soft_cross_entropy
    return partial(
        soft_binary_cross_entropy, target_threshold=options.target_threshold, sum_classes=options.sum_classes
    )


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy with soft targets, computed in float32.

    Args:
        logits: float (B, num_classes).
        targets: float32 (B, num_classes). Each row is a distribution, or zero for a sample that adds nothing.

    Returns:
        A float32 scalar.
    """
    return F.cross_entropy(logits.float(), targets)


def soft_binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    target_threshold: float | None = None,
    sum_classes: bool = False,
) -> torch.Tensor:
    """Binary cross entropy of every class, averaged over classes and samples, computed in float32.

    Source: "ResNet strikes back" (Wightman et al., 2021).

    Args:
        logits: float (B, num_classes).
        targets: float32 (B, num_classes). A sample whose row is zero adds nothing.
        target_threshold: targets above it become 1 and the others 0. With None they stay soft.
        sum_classes: whether the losses are summed over the classes instead of averaged.

    Returns:
        A float32 scalar.
    """
    valid = targets.sum(dim=1, keepdim=True) > 0
    if target_threshold is not None:
        targets = (targets > target_threshold).to(targets.dtype)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none") * valid
    return losses.sum(dim=1).mean() if sum_classes else losses.mean()
