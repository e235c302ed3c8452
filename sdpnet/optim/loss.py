"""The training loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from sdpnet.config.options import LossOptions

__all__ = ["make_loss", "soft_binary_cross_entropy", "soft_cross_entropy"]


def make_loss(options: LossOptions) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of logits (B, num_classes) and soft targets (B, num_classes) that `options` names."""
    if options.kind == "ce":
        return soft_cross_entropy
    return partial(
        soft_binary_cross_entropy, target_threshold=options.target_threshold, sum_classes=options.sum_classes
    )


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy with soft targets, in float32 whatever the logits' dtype.

    Args:
        logits: float (B, num_classes).
        targets: float32 (B, num_classes), each row a distribution, or zero: that sample adds nothing.

    Returns:
        float32, a scalar.
    """
    return F.cross_entropy(logits.float(), targets)


def soft_binary_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    target_threshold: float | None = None,
    sum_classes: bool = False,
) -> torch.Tensor:
    """Binary cross entropy of every class, its mean over classes and samples ("ResNet strikes back", Wightman et al.,
    2021), in float32; arguments and masked samples as for `soft_cross_entropy`.

    Args:
        target_threshold: targets above it become 1, the others 0; None leaves them soft.
        sum_classes: the sum over classes, where otherwise their mean is taken.
    """
    valid = targets.sum(dim=1, keepdim=True) > 0
    if target_threshold is not None:
        targets = (targets > target_threshold).to(targets.dtype)
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none") * valid
    return losses.sum(dim=1).mean() if sum_classes else losses.mean()
