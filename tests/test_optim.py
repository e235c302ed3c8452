from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR, SequentialLR

from sdpnet.config import OptimOptions
from sdpnet.model import create_model
from sdpnet.optim import learning_rate, make_optimizer, peak_learning_rate


@pytest.mark.parametrize("factor", [1, 2])
def test_schedule_equals_torchs_schedulers(factor: int) -> None:
    options = OptimOptions(warmup_epochs=2, restart_epochs=3, restart_factor=factor, min_lr=1e-5)
    steps_per_epoch, epochs = 7, 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    warmup = LinearLR(optimizer, start_factor=1 / 14, total_iters=13)  # its 14th step has the full rate
    cosine = CosineAnnealingWarmRestarts(optimizer, T_0=21, T_mult=factor, eta_min=1e-5)
    scheduler = SequentialLR(optimizer, [warmup, cosine], milestones=[14])
    for step in range(epochs * steps_per_epoch):
        expected = optimizer.param_groups[0]["lr"]
        ours = learning_rate(step, options, peak=0.02, steps_per_epoch=steps_per_epoch, epochs=epochs)
        assert ours == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        scheduler.step()


def test_without_restarts_one_cosine_reaches_the_end() -> None:
    options = OptimOptions(warmup_epochs=0, min_lr=0.0)
    rates = [learning_rate(s, options, peak=1.0, steps_per_epoch=10, epochs=5) for s in range(50)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 2e-3


def test_the_seed_recipes_learning_rate() -> None:
    assert peak_learning_rate(OptimOptions(lr=1e-3), 960) == pytest.approx(0.001875)
    assert peak_learning_rate(OptimOptions(lr=1e-3, lr_reference_batch=0), 960) == 1e-3


def test_decay_spares_norms_biases_and_tokens() -> None:
    model = create_model("sdpnet_tiny", 10)
    optimizer = make_optimizer(model, OptimOptions(weight_decay=0.05))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert decayed | plain == set(names.values()) and not decayed & plain
    assert {"class_token", "registers"} <= plain
    assert all(n.endswith(".weight") and "norm" not in n for n in decayed)
    assert all("norm" in n or n.endswith(".bias") or n in ("class_token", "registers") for n in plain)
