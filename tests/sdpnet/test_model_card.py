"""`model.json`: what is out of range, of another type, nested without end or too large ends in one line."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdpnet.checkpoints.model import ModelCard, load_model, save_model
from sdpnet.checkpoints.model_card import parse_card, read_card
from sdpnet.model.sdpnet import create_model
from sdpnet.pipelines.errors import UserError


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    model = create_model("sdpnet_tiny", 3)
    card = ModelCard(model.options, ("ant", "bee", "cow"), 64, 0.875, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {"top1": 0.5})
    save_model(tmp_path, model, card)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "data.image_size = 0: must be 8 to 4,096 pixels"),
        ({"image_size": -64}, "data.image_size = -64: must be 8 to 4,096 pixels"),
        ({"image_size": 10**9}, "data.image_size = 1000000000: must be 8 to 4,096 pixels"),
        ({"image_size": 2**70}, f"data.image_size = {2**70}: must be 8 to"),
        ({"image_size": 20}, "image_size = 20: must be a multiple of the patch size 8"),
        ({"image_size": 64.0}, "image_size = 64.0: must be a multiple of"),
        ({"image_size": True}, "image_size = True: must be a multiple of"),
        ({"image_size": "64"}, "image_size = '64': must be a multiple of"),
        ({"mean": "abc"}, "mean = 'abc': must be three numbers"),
        ({"mean": [0.5, "0.5", 0.5]}, "mean = 'tuple of 3': must be three numbers"),
        ({"mean": [0.5, math.nan, 0.5]}, "must be three numbers"),
        ({"mean": [0.5, 0.5]}, "must be three numbers"),
        ({"std": [0, 0.2, 0.2]}, r"augment.std = \(0, 0.2, 0.2\): must be in \[1e-6, 1\]"),
        ({"std": [10**400, 1, 1]}, "must be three numbers"),
        ({"centre_fraction": math.nan}, "centre_fraction = nan: must be a number"),
        ({"centre_fraction": 1.5}, r"data.centre_fraction = 1.5: must be in \(0, 1\]"),
        ({"centre_fraction": "x" * 10**6}, "must be a number"),
        ({"classes": []}, "classes = '0 names': must be 1 to 3"),
        ({"classes": ["a"] * 4}, "classes = '4 names': must be 1 to 3"),
        ({"classes": "ant"[:0]}, "classes"),
        ({"classes": ["a", 1, "b"]}, "classes = 1: must be text"),
        ({"metrics": {"top1": "high"}}, "metrics.top1 = 'high': must be a number"),
        ({"metrics": 5}, "not iterable"),
        ({"weights": "other"}, "weights = 'other': must be raw or ema"),
        ({"preprocessing": {"exif": 5}}, "exif = 5: must be"),
        ({"preprocessing": []}, "must be a mapping"),
        ({"model": []}, "must be a mapping"),
        ({"model": {"layer_scale": math.nan}}, "model.layer_scale = nan: must be"),
        ({"model": {"dropout": "0.1"}}, "model.dropout = '0.1': must be"),
        ({"model": {"dim": 2**70}}, "model.dim = "),
    ],
)
def test_a_value_out_of_range(changes: dict[str, Any], message: str, finished: Path) -> None:
    path = finished / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message) as caught:
        load_model(finished)
    assert str(caught.value).startswith(f"{path}: cannot be read as a model's card: ") and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"model":' * 50_000, "9" * 10_000, "null", "[]", '"x"', "{}", "\ufeff{}", "{\x00}"]
)
def test_what_is_no_card_at_all(text: str, finished: Path) -> None:
    (finished / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.json: cannot be read as a model's card"):
        load_model(finished)


def test_a_missing_key_is_named(finished: Path) -> None:
    facts = json.loads((finished / "model.json").read_text())
    del facts["std"]
    with pytest.raises(UserError, match="it lacks std"):
        parse_card(facts)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_special_and_endless_files(name: str, finished: Path) -> None:
    path = finished / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a file"):
        load_model(finished)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes, more than the"):
        load_model(finished)


def test_weights_that_the_card_was_not_written_for(finished: Path) -> None:
    """A turned bit gives other answers and no error; the card's checksum tells. Cards of before have none."""
    path = finished / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: it is not the file that model\.json was"):
        load_model(finished)
    facts = json.loads((finished / "model.json").read_text())
    del facts["weights_sha256"]
    (finished / "model.json").write_text(json.dumps(facts))
    assert load_model(finished)[1] == read_card(finished / "model.json")


def test_weights_that_are_not_finite(finished: Path) -> None:
    model, card = load_model(finished)
    weights = {**model.state_dict(), "head.2.bias": torch.tensor([0, math.nan, 0])}
    (finished / "model.json").write_text(json.dumps({**asdict(card), "weights_sha256": ""}))
    save_file(weights, finished / "model.safetensors")
    with pytest.raises(UserError, match=r"head\.2\.bias is not finite"):
        load_model(finished)


def test_the_same_model_is_not_written_again(finished: Path) -> None:
    model, card = load_model(finished)
    before = {path: path.stat().st_ino for path in finished.iterdir()}
    assert not save_model(finished, model, card)
    assert {path: path.stat().st_ino for path in finished.iterdir()} == before
    (finished / "model.json").unlink()
    assert save_model(finished, model, card) and load_model(finished)[1] == card
