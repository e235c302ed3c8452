from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sdpnet.checkpoints.changes import changed_images, changed_keys, require_same_classes
from sdpnet.config.load import load_config
from sdpnet.pipelines.errors import UserError

PATH = Path("run/checkpoints/step_00000008.pt")
STATE: dict[str, Any] = {"card": {"classes": ("ant", "bee")}, "data": {"train": "1", "val": "2"}}


def test_classes_are_compared_by_name_and_order() -> None:
    assert require_same_classes(PATH, STATE, ["ant", "bee"], "SET", allow=False) is None
    assert require_same_classes(PATH, {}, ["ant", "cow"], "SET", allow=False) is None  # version 1 does not say
    with pytest.raises(
        UserError, match=r"step_00000008\.pt: .* of SET: class 0 is 'ant' there and 'bee' here"
    ) as error:
        require_same_classes(PATH, STATE, ["bee", "ant"], "SET", allow=False)
    assert "train.other_classes=keep" in str(error.value)
    line = require_same_classes(PATH, STATE, ["ant", "cow"], "SET", allow=True)
    assert line == "SET: other classes than before, under the same numbers: class 1 is 'bee' there and 'cow' here"


def test_images_are_compared_by_checksum() -> None:
    assert changed_images(STATE, {"train": "1", "val": "2"}, "SET") is None
    assert changed_images({}, {"train": "1"}, "SET") is None  # older checkpoints do not say
    line = changed_images(STATE, {"train": "1", "val": "3"}, "SET")
    assert line is not None and line.startswith("SET: the images of split 'val' are not those")
    line = changed_images(STATE, {"train": "0", "val": "3"}, "SET")
    assert line is not None and "the images of splits 'train' and 'val' are not those" in line


def test_each_changed_key_is_one_line_in_the_words_of_a_config() -> None:
    before = asdict(load_config("debug", ["data.path=shards"]))
    changes = ["optim.lr=0.5", "train.epochs=7", "data.crop.scale=[0.5, 1]", "train.compile=false", "model.dim=32"]
    changes += ["train.micro_batch=2", "train.start_from=/other"]
    now = asdict(load_config("debug", ["data.path=/home/shards", *changes]))
    assert changed_keys({"config": before}, now, Path("/home")) == [
        "config: model.dim was 64, is 32 from here on",
        "config: data.crop.scale was [0.08, 1.0], is [0.5, 1.0] from here on",
        "config: optim.lr was 0.001, is 0.5 from here on",
        "config: train.epochs was 1, is 7 from here on",
        "config: train.start_from was empty, is /other from here on",
        "config: train.micro_batch was null, is 2 from here on",
        "config: train.compile was auto, is false from here on",
    ]
    assert "config: data.path was shards, is /home/shards from here on" in changed_keys(
        {"config": before}, now, Path("/")
    )
    assert changed_keys({"config": now}, now, Path("/")) == [] == changed_keys({}, now, Path("/"))


def test_keys_of_another_version_are_no_change() -> None:
    now = asdict(load_config("debug"))
    before = {**now, "train": {key: value for key, value in now["train"].items() if key != "epochs"}, "gone": {"x": 1}}
    before["augment"] = {**now["augment"], "mean": list(now["augment"]["mean"])}
    assert changed_keys({"config": before}, now, Path("/")) == []
