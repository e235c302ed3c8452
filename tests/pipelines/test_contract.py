from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion import write_manifest
from pipeline_batches import loader_for

from sdpnet.config.load import load_config
from sdpnet.config.options import Config
from sdpnet.pipelines.errors import BackendMissingError, ShardError, UserError
from sdpnet.pipelines.executors.registry import PIPELINES, choose_pipeline
from sdpnet.pipelines.options import ShardOptions
from sdpnet.pipelines.terminal.remedy import install_extra

CPU = torch.device("cpu")


def config_for(data: Path, *settings: str) -> Config:
    return load_config("debug", [f"data.path={data}", "data.batch_size_per_gpu=4", *settings])


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0)])
def test_shard_options_echo_a_bad_value(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of world size {world_size}"):
        ShardOptions(rank, world_size)


@pytest.mark.parametrize(("name", "module"), [("ffcv", "ffcv"), ("dali", "nvidia.dali")])
def test_a_missing_backend_says_cause_remedy_and_what_works(
    name: str, module: str, shard_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [m for m in sys.modules if m.startswith(f"{module}.") or m == PIPELINES[name][0]]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(BackendMissingError) as caught:
        loader_for(config_for(shard_set, f"data.pipeline={name}"), "train")
    message = str(caught.value)
    assert f"pipeline {name!r} cannot be used here" in message and module in message and "\n" not in message
    assert install_extra(name) in message and "torchvision" in message.split("would work:")[1]


def test_auto_takes_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = "sdpnet.pipelines.executors.registry.installed"
    assert choose_pipeline(CPU, "beton") in ("native", "ffcv", "torchvision")
    monkeypatch.setattr(
        "sdpnet.pipelines.executors.registry.installed", lambda name: name in ("native", "dali", "ffcv")
    )
    assert choose_pipeline(CPU, "beton") == choose_pipeline(torch.device("cuda"), "tar") == "native"
    monkeypatch.setattr(installed, lambda name: name in ("dali", "ffcv"))
    assert choose_pipeline(CPU, "beton") == "ffcv"
    assert choose_pipeline(CPU, "tar") == "torchvision"  # FFCV reads .beton files only
    monkeypatch.setattr(installed, lambda name: name == "dali")
    assert choose_pipeline(torch.device("cuda"), "beton") == "dali"
    assert choose_pipeline(CPU, "beton") == "torchvision"  # DALI on a CPU is no faster
    monkeypatch.setattr(installed, lambda name: False)
    assert choose_pipeline(torch.device("cuda"), "beton") == "torchvision"
    assert set(PIPELINES) == {"native", "torchvision", "ffcv", "dali", "synthetic"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.val_split=test"], r"no split 'test'; it has train, val"),
        (["data.batch_size_per_gpu=26"], r"has 24 samples, fewer than one batch"),
        (["data.batch_size_per_gpu=3"], r"data\.batch_size_per_gpu = 3: MixUp and CutMix mix pairs: must be even"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: list[str], message: str, shard_set: Path) -> None:
    config = config_for(shard_set, *settings)
    with pytest.raises(UserError, match=message):
        for split in ("train", "val"):
            loader_for(config, split)


def test_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass --data SHARDS"):
        loader_for(replace(config_for(tmp_path), data=replace(Config().data, path="")), "train")
    with pytest.raises(ShardError, match=r"no manifest\.json here"):
        loader_for(config_for(tmp_path), "train")


def test_labels_outside_the_manifests_classes(shard_set: Path, tmp_path: Path) -> None:
    manifest = json.loads((shard_set / "manifest.json").read_text())
    manifest["classes"] = manifest["classes"][:2]
    write_manifest(tmp_path, manifest)
    for name in ("train.beton", "val.beton"):
        (tmp_path / name).symlink_to(shard_set / name)
    with pytest.raises(ShardError, match=r"sample \d+: label 2, but there are 2 classes"):
        loader_for(config_for(tmp_path), "train")
