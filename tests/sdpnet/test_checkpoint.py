from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpnet.checkpoints.model import (
    Checkpoints,
    ModelCard,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    load_optimizer,
    load_weights,
    save_model,
    write_atomically,
)
from sdpnet.config.options import OptimOptions
from sdpnet.model.sdpnet import create_model
from sdpnet.optim.optimizer import make_optimizer, step_unless
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.preprocessing import Preprocessing

STATE = {
    "model": {"w": torch.arange(3.0)},
    "optimizer": {},
    "scaler": {},
    "cursor": {"step": 1},
    "order": {},
    "evaluation": {},
}


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    Checkpoints(directory, keep, keep_best=False, asynchronous=False).save(step, state)
    return directory / f"step_{step:08d}.pt"


def test_newest_is_by_step_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 12, 100, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, STATE, keep=2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_100000000.pt"
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(load_checkpoint(tmp_path / "step_100000000.pt")["model"]["w"], torch.arange(3.0))
    assert latest_checkpoint(tmp_path / "absent") is None


def test_a_file_cut_short_never_has_the_final_name(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "step_00000001.pt", fail)
    assert latest_checkpoint(tmp_path) is None


def card() -> ModelCard:
    model = create_model("sdpnet_tiny", 3)
    return ModelCard(model.options, ("a", "b", "c"), 32, 0.875, (0.5,) * 3, (0.2,) * 3, {"top1": 0.5})


def test_a_model_survives_a_round_trip(tmp_path: Path) -> None:
    model = create_model("sdpnet_tiny", 3).eval()
    save_model(tmp_path, model, card())
    loaded, loaded_card = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), loaded(images)) and loaded_card == card()
    assert load_model(tmp_path / "model.safetensors")[1] == load_model(tmp_path / "model.json")[1] == card()


def test_a_card_says_what_was_done_to_the_images(tmp_path: Path) -> None:
    model = create_model("sdpnet_tiny", 3)
    ours = replace(card(), preprocessing=Preprocessing("apply", 400))
    save_model(tmp_path, model, ours)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["preprocessing"] == {"exif": "apply", "max_side": 400}
    assert load_model(tmp_path)[1] == ours
    del facts["preprocessing"], facts["weights"]  # as earlier versions wrote it
    (tmp_path / "model.json").write_text(json.dumps(facts))
    assert load_model(tmp_path)[1] == replace(ours, preprocessing=Preprocessing("ignore", 0))
    for wrong in ({"exif": "turn"}, {"max_side": -1}, {"gamma": 2}, "apply"):
        (tmp_path / "model.json").write_text(json.dumps({**facts, "preprocessing": wrong}))
        with pytest.raises(UserError, match="cannot be read"):
            load_model(tmp_path)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model = create_model("sdpnet_tiny", 3)
    with pytest.raises(UserError, match=r"is of another model: head\.2\.weight is \(4, 128\) there, \(3, 128\) here"):
        load_weights(model, create_model("sdpnet_tiny", 4).state_dict(), tmp_path)
    with pytest.raises(UserError, match=r"it lacks conv_blocks\.1\.depthwise\.weight"):
        load_weights(model, create_model("sdpnet_tiny", 3, conv_blocks=1).state_dict(), tmp_path)


def halves(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight / 2 for name, weight in weights.items() if weight.is_floating_point()}


def run_state(seed: int, ema: bool, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    weights = create_model("sdpnet_tiny", 3).state_dict()
    facts = {**asdict(card()), **changes}
    rest = {name: {} for name in ("optimizer", "scaler", "cursor", "order", "evaluation", "config", "world", "guard")}
    return {"version": 2, **rest, "model": weights, "ema": halves(weights) if ema else None, "card": facts}


def bias(path: Path, **options: Any) -> torch.Tensor:
    return load_model(path, **options)[0].state_dict()["head.2.weight"]


@pytest.mark.parametrize("ema", [False, True])
def test_a_model_is_loaded_from_a_checkpoint_or_an_unfinished_run(tmp_path: Path, ema: bool) -> None:
    states = [run_state(seed, ema) for seed in (1, 2, 3)]
    for step, state in enumerate(states):
        save_checkpoint(tmp_path / "checkpoints", step, state, keep=9)
    raw = [state["model"]["head.2.weight"] for state in states]
    one = tmp_path / "checkpoints" / "step_00000001.pt"
    assert torch.equal(bias(one), raw[1] / (1 + ema)) and torch.equal(bias(one, weights="raw"), raw[1])
    assert torch.equal(bias(tmp_path), raw[2] / (1 + ema)) and torch.equal(bias(tmp_path, weights="raw"), raw[2])
    loaded, facts = load_model(one)
    assert not loaded.training and facts == replace(card(), weights="ema" if ema else "raw")
    (tmp_path / "checkpoints" / "step_00000002.pt").write_bytes(b"damaged")
    lines: list[str] = []
    assert torch.equal(bias(tmp_path, weights="raw", say=lines.append), raw[1]) and "step_00000002" in lines[0]


def test_a_finished_model_has_the_averaged_weights_and_its_run_the_raw_ones(tmp_path: Path) -> None:
    model = create_model("sdpnet_tiny", 3)
    save_model(tmp_path, model, card(), halves(model.state_dict()))
    loaded, facts = load_model(tmp_path)
    assert facts.weights == "ema"
    assert torch.equal(loaded.head[2].weight, model.head[2].weight / 2)
    assert torch.equal(loaded.patch_norm.num_batches_tracked, model.patch_norm.num_batches_tracked)
    with pytest.raises(UserError, match="holds averaged weights, and there is no checkpoint"):
        load_model(tmp_path, weights="raw")
    state = run_state(5, True)
    save_checkpoint(tmp_path / "checkpoints", 1, state, keep=1)
    assert torch.equal(bias(tmp_path, weights="raw"), state["model"]["head.2.weight"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dim": 1 << 40}, "its card: model.dim = 1099511627776: must be at least 1, at most 131,072"),
        ({"conv_blocks": 1 << 40}, "its card: model.conv_blocks = 1099511627776: must be at least 0, at most 512"),
        ({"conv_blocks": 512}, "is of another model"),
        ({"head_hidden": 1 << 50}, "its card: model.head_hidden = 1125899906842624: must be at least 1"),
        ({"dim": 128.0}, "its card: model.dim = 128.0: must be a whole number"),
        ({"heads": 0}, "its card: model.heads = 0: must be at least 1"),
        ({"depth": 3}, "its card: .*depth"),
        ({"num_classes": 4}, "is of another model"),
    ],
)
def test_a_card_that_does_not_fit_the_weights(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    state = run_state(1, False, model={**asdict(card().model), **changes})
    with pytest.raises(UserError, match=match) as caught:
        load_model(save_checkpoint(tmp_path, 1, state, keep=1))
    assert "\n" not in str(caught.value) and "step_00000001.pt" in str(caught.value)


def test_a_checkpoint_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of an earlier version"):
        load_model(save_checkpoint(tmp_path, 1, STATE, keep=1))


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    model = create_model("sdpnet_tiny", 3)
    weights = {**model.state_dict(), "head.2.bias": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(UserError, match=r"head\.2\.bias is torch\.int64, not torch\.float32"):
        load_weights(model, weights, tmp_path)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    def stepped(width: int, layers: int) -> torch.optim.AdamW:
        layer = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
        layer(torch.ones(1, width)).sum().backward()
        optimizer = torch.optim.AdamW(layer.parameters())
        optimizer.step()
        return optimizer

    own = stepped(3, 2)
    load_optimizer(own, stepped(3, 2).state_dict(), tmp_path)
    for state in (stepped(4, 2).state_dict(), stepped(3, 1).state_dict(), {}, {"state": {}, "param_groups": [1]}):
        with pytest.raises(UserError, match="the state of another optimizer") as caught:
            load_optimizer(stepped(3, 2), state, tmp_path)
        assert "\n" not in str(caught.value)


def test_an_optimizers_settings_are_the_configs_not_the_files(tmp_path: Path) -> None:
    """A run may go on with another weight decay, on another device (fused) and in another memory format."""

    def stepped(memory_format: torch.memory_format, **settings: Any) -> torch.optim.AdamW:
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        layer(torch.ones(1, 3, 5, 5)).sum().backward()
        optimizer = torch.optim.AdamW(layer.parameters(), **settings)
        optimizer.step()
        return optimizer

    for was, now in ((None, True), (True, None)):
        own = stepped(torch.channels_last, weight_decay=0.5, betas=(0.5, 0.6), fused=now)
        load_optimizer(own, stepped(torch.contiguous_format, weight_decay=0.05, fused=was).state_dict(), tmp_path)
        (group,) = own.param_groups
        assert (group["weight_decay"], group["betas"], group["fused"]) == (0.5, (0.5, 0.6), now)
        weight = group["params"][0]
        assert own.state[weight]["exp_avg"].stride() == weight.stride()
        torch.testing.assert_close(own.state[weight]["exp_avg"], 0.1 * weight.grad)  # by the file's betas
        if now:
            step_unless(own, torch.zeros(()))
        else:
            own.step()
        assert own.state[weight]["step"] == 2


def test_muons_state_is_checked_too(tmp_path: Path) -> None:
    def stepped(dim: int) -> torch.optim.Optimizer:
        model = create_model("sdpnet_tiny", 3, dim=dim)
        optimizer = make_optimizer(model, OptimOptions(name="muon"))
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        optimizer.step()
        return optimizer

    load_optimizer(stepped(32), stepped(32).state_dict(), tmp_path)
    with pytest.raises(UserError, match="the state of another optimizer"):
        load_optimizer(stepped(32), stepped(64).state_dict(), tmp_path)


def test_a_missing_or_damaged_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not there"):
        load_model(tmp_path)
    save_model(tmp_path, create_model("sdpnet_tiny", 3), card())
    for name, content in (("model.safetensors", b"xx"), ("model.json", b"{}")):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_model(tmp_path)
        (tmp_path / name).write_bytes(good)
