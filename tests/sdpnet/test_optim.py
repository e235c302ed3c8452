from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from sdpnet.config.options import OptimOptions
from sdpnet.model.sdpnet import SdPNet, create_model, create_model_options
from sdpnet.optim.learning_rate import learning_rate, peak_learning_rate, set_learning_rate
from sdpnet.optim.muon import MuonAdamW, orthogonalize
from sdpnet.optim.optimizer import make_optimizer


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


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedules_equal_torchs(schedule: str) -> None:
    options = OptimOptions(schedule=schedule, warmup_epochs=2, restart_epochs=3, min_lr=1e-5)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    warmup = LinearLR(optimizer, start_factor=1 / 14, total_iters=13)
    rest: LRScheduler = ConstantLR(optimizer, factor=1.0)
    if schedule == "cosine":
        rest = CosineAnnealingLR(optimizer, T_max=126, eta_min=1e-5)
    scheduler = SequentialLR(optimizer, [warmup, rest], milestones=[14])
    for step in range(140):
        expected = optimizer.param_groups[0]["lr"]
        ours = learning_rate(step, options, peak=0.02, steps_per_epoch=7, epochs=20)
        assert ours == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        scheduler.step()


class Grouped(SdPNet):
    """Says to timm which of its parameters are one layer."""

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        return {
            "stem": r"^(?:patch|class_token|registers|position)",
            "conv": r"^conv_blocks\.(\d+)",
            "transformer": r"^transformer_blocks\.(\d+)",
        }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_layers_rates_are_timms(name: str) -> None:
    """Also for what other options of the model add: a position embedding, layer scales, a norm before the head."""
    model = Grouped(create_model_options("sdpnet_tiny", conv_blocks=3, transformer_blocks=11))
    model.position_embedding = nn.Parameter(torch.zeros(1, 16, 128))
    model.norm = nn.LayerNorm(128)
    model.transformer_blocks[0].layer_scale = nn.Parameter(torch.ones(1, 128))
    names = {id(p): n for n, p in model.named_parameters()}

    def layout(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
        return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    optimizer = make_optimizer(model, OptimOptions(name=name, layer_decay=0.7))  # type: ignore[arg-type]
    ours = layout(optimizer.param_groups)
    tokens = ("class_token", "registers", "position_embedding", "*layer_scale")
    theirs = layout(param_groups_layer_decay(model, 0.05, tokens, layer_decay=0.7))
    assert set(ours) == set(theirs) == set(names.values())
    for parameter, (scale, decay) in theirs.items():
        assert ours[parameter] == (pytest.approx(scale), decay), parameter
    set_learning_rate(optimizer, 0.2)
    assert {g["lr"] for g in optimizer.param_groups} == {0.2 * g["lr_scale"] for g in optimizer.param_groups}
    assert max(g["lr"] for g in optimizer.param_groups) == 0.2


def backward(model: SdPNet, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()


def test_muon_takes_the_blocks_matrices() -> None:
    model = create_model("sdpnet_tiny", 10)
    optimizer = make_optimizer(model, OptimOptions(name="muon"))
    assert isinstance(optimizer, MuonAdamW)
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for group in optimizer.parts["muon"].param_groups for p in group["params"]}
    assert taken == {
        n
        for n in names.values()
        if n.endswith(("pointwise.weight", "qkv.weight", "proj.weight", "mlp.0.weight", "mlp.3.weight"))
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_muon_and_adamw_as_one_equal_torchs_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 x 1 convolutions are given to torch's Muon as matrices; both take its own iteration, which is in bf16."""
    settings = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    monkeypatch.setattr(
        "sdpnet.optim.muon.orthogonalize",
        lambda matrices: torch.stack([_zeropower_via_newtonschulz(matrix, *settings) for matrix in matrices]),
    )
    options = OptimOptions(name="muon", weight_decay=1.0)
    model, reference = create_model("sdpnet_tiny", 10), create_model("sdpnet_tiny", 10)
    reference.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, options)
    assert isinstance(optimizer, MuonAdamW)
    matrices = [p for g in optimizer.parts["muon"].param_groups for p in g["params"]]
    of_muon = {n for n, p in model.named_parameters() if any(p is m for m in matrices)}
    twins = {n: nn.Parameter(p.detach().flatten(1)) for n, p in reference.named_parameters() if n in of_muon}
    muon = torch.optim.Muon(twins.values(), lr=1.0, weight_decay=1.0, adjust_lr_fn="match_rms_adamw")
    adamw = make_optimizer(reference, replace(options, name="adamw"))
    for step, lr in enumerate((1e-2, 5e-3, 2e-2)):
        set_learning_rate(optimizer, lr)
        set_learning_rate(adamw, lr)
        muon.param_groups[0]["lr"] = lr
        for network in (model, reference):
            network.zero_grad()
            backward(network, step)
        gradients = {n: p.grad for n, p in model.named_parameters()}
        for name, parameter in reference.named_parameters():
            parameter.grad = None if name in of_muon else gradients[name]  # the same for both
        for name, twin in twins.items():
            gradient = gradients[name]
            assert gradient is not None
            twin.grad = gradient.flatten(1)
        optimizer.step()
        muon.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        other = twins[name].view_as(parameter) if name in of_muon else reference.get_parameter(name)
        torch.testing.assert_close(parameter, other, msg=name)


@pytest.mark.parametrize("shape", [(96, 96), (384, 96), (96, 384)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    stretched = left.mT @ result.double() @ right.mT
    singular = torch.diagonal(stretched, dim1=1, dim2=2)
    assert (singular > 0.3).all() and (singular < 1.3).all() and 0.6 < singular.mean() < 1.1
    assert (stretched - torch.diag_embed(singular)).abs().max() < 1e-3


def test_nadamuon_is_timms_beside_our_adamw() -> None:
    pytest.importorskip("timm", "1.0.22")
    from timm.optim import create_optimizer_v2

    model = create_model("sdpnet_tiny", 10)
    ours = make_optimizer(model, OptimOptions(name="nadamuon", lr=1e-3, betas=(0.9, 0.95)))
    assert isinstance(ours, MuonAdamW)
    matrices = [p for group in ours.parts["muon"].param_groups for p in group["params"]]
    twins = [nn.Parameter(p.detach().clone()) for p in matrices]
    theirs = create_optimizer_v2(twins, "nadamuon", lr=1e-3, weight_decay=0.05, momentum=0.95, betas=(0.9, 0.95))
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        for parameter, twin in zip(matrices, twins, strict=True):
            twin.grad = parameter.grad
        ours.step()
        theirs.step()
    assert all(torch.equal(parameter, twin) for parameter, twin in zip(matrices, twins, strict=True))
    assert len(matrices) == 2 * 4 + 2


@pytest.mark.parametrize("name", ["adamw", "muon", "nadamuon"])
def test_optimizers_continue_from_their_state(name: str, tmp_path: Path) -> None:
    if name == "nadamuon":
        pytest.importorskip("timm", "1.0.22")
    options = OptimOptions(name=name, layer_decay=0.8)  # type: ignore[arg-type]
    model = create_model("sdpnet_tiny", 10)
    optimizer = make_optimizer(model, options)

    def steps(network: SdPNet, using: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            set_learning_rate(using, 1e-3 * (seed + 1))
            using.zero_grad()
            backward(network, seed)
            using.step()

    steps(model, optimizer, range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    steps(model, optimizer, range(2, 4))
    again = create_model("sdpnet_tiny", 10)
    continued = make_optimizer(again, options)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    continued.load_state_dict(state["optimizer"])
    steps(again, continued, range(2, 4))
    for parameter, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[parameter], rtol=0, atol=0, msg=parameter)
