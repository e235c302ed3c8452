"""The training loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["soft_cross_entropy"]


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy with soft targets, in float32 whatever the logits' dtype.

    Args:
        logits: float (B, num_classes).
        targets: float32 (B, num_classes), each row a distribution, or zero: that sample adds nothing.

    Returns:
        float32, a scalar.
    """
    return F.cross_entropy(logits.float(), targets)
