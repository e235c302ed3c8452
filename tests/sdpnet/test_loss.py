from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F

from sdpnet.config.options import LossOptions
from sdpnet.optim.loss import make_loss

BATCH, CLASSES = 16, 10


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> torch.Tensor:
    """Two classes mixed, with smoothing."""
    generator = torch.Generator().manual_seed(1)
    first, second = F.one_hot(torch.randint(CLASSES, (2, BATCH), generator=generator), CLASSES).float()
    share = torch.rand(BATCH, 1, generator=generator)
    return 0.9 * (share * first + (1 - share) * second) + 0.1 / CLASSES


KINDS: list[tuple[dict[str, Any], torch.nn.Module]] = [
    ({"kind": "ce"}, SoftTargetCrossEntropy()),
    ({"kind": "bce"}, BinaryCrossEntropy()),
    ({"kind": "bce", "sum_classes": True}, BinaryCrossEntropy(sum_classes=True)),
    ({"kind": "bce", "target_threshold": 0.2}, BinaryCrossEntropy(target_threshold=0.2)),
    (
        {"kind": "bce", "target_threshold": 0.0, "sum_classes": True},
        BinaryCrossEntropy(target_threshold=0.0, sum_classes=True),
    ),
]


@pytest.mark.parametrize(("options", "oracle"), KINDS)
def test_losses_and_gradients_are_timms(
    options: dict[str, Any], oracle: torch.nn.Module, logits: torch.Tensor, targets: torch.Tensor
) -> None:
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = make_loss(LossOptions(**options))(ours, targets), oracle(theirs, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("options", "oracle"), KINDS)
def test_masked_samples_add_nothing(
    options: dict[str, Any], oracle: torch.nn.Module, logits: torch.Tensor, targets: torch.Tensor
) -> None:
    """The others count as in the whole batch, and the masked ones have no gradient."""
    valid = torch.arange(BATCH) % 3 > 0
    logits.requires_grad_()
    loss = make_loss(LossOptions(**options))(logits, targets * valid.view(-1, 1))
    torch.testing.assert_close(loss, oracle(logits[valid], targets[valid]) * valid.sum() / BATCH)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(dim=1) > 0, valid)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_half_precision_logits_are_scored_in_float32(kind: Any, logits: torch.Tensor, targets: torch.Tensor) -> None:
    loss = make_loss(LossOptions(kind))
    low = loss(logits.bfloat16(), targets)
    assert low.dtype == torch.float32
    assert torch.equal(low, loss(logits.bfloat16().float(), targets))
