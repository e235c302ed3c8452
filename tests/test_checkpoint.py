from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from sdpnet.checkpoint import (
    ModelCard,
    latest_checkpoint,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
    save_model,
    write_atomically,
)
from sdpnet.model import create_model

STATE = {
    "model": {"w": torch.arange(3.0)},
    "optimizer": {},
    "scaler": {},
    "cursor": {"step": 1},
    "order": {},
    "evaluation": {},
}


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


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("exit 1",)


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "list", "code", "pickle"])
def test_hostile_checkpoints_are_refused(kind: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, STATE, keep=1)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "code":
        torch.save({**STATE, "model": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"step_00000001\.pt: not a (readable )?checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def card() -> ModelCard:
    model = create_model("sdpnet_tiny", 3)
    return ModelCard(model.options, ("a", "b", "c"), 32, 0.875, (0.5,) * 3, (0.2,) * 3, {"top1": 0.5})


def test_a_model_survives_a_round_trip(tmp_path: Path) -> None:
    model = create_model("sdpnet_tiny", 3).eval()
    save_model(tmp_path, model, card())
    loaded, loaded_card = load_model(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), loaded(images)) and loaded_card == card()
    assert load_model(tmp_path / "model.safetensors")[1] == card()


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model = create_model("sdpnet_tiny", 3)
    with pytest.raises(UserError, match=r"is of another model: head\.2\.weight is \(4, 128\) there, \(3, 128\) here"):
        load_weights(model, create_model("sdpnet_tiny", 4).state_dict(), tmp_path)
    with pytest.raises(UserError, match=r"it lacks conv_blocks\.1\.depthwise\.weight"):
        load_weights(model, create_model("sdpnet_tiny", 3, conv_blocks=1).state_dict(), tmp_path)


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
