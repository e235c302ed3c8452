"""Batches of each pipeline for the tests, and the pipelines that are installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpnet.config.load import load_config
from sdpnet.config.options import Config
from sdpnet.pipelines.contract import Batch, Loader
from sdpnet.pipelines.executors.registry import installed
from sdpnet.pipelines.loader import make_loader
from sdpnet.pipelines.options import AugmentOptions, ShardOptions

__all__ = ["CPU", "collect", "config_for", "installed", "kept", "load", "loader_for", "pipeline"]

CPU = torch.device("cpu")


def config_for(data: Path, name: str, **changes: object) -> Config:
    config = load_config("debug", [f"data.path={data}", f"data.pipeline={name}", "data.batch_size_per_gpu=4"])
    return replace(config, data=replace(config.data, **{"num_workers": 2, **changes}))


def loader_for(config: Config, split: str, shard: ShardOptions | None = None, device: torch.device = CPU) -> Loader:
    """The loader of a training with this config."""
    kind: Any = split
    return make_loader(config.data, config.augment, kind, shard or ShardOptions(), device, seed=config.seed)


def load(
    data: Path,
    name: str,
    split: str = "train",
    shard: ShardOptions | None = None,
    augment: AugmentOptions | None = None,
    **changes: object,
) -> Loader:
    config = config_for(data, name, **changes)
    config = replace(config, augment=augment or config.augment)
    return loader_for(config, split, shard or ShardOptions())


def kept(batch: Batch) -> Batch:
    return replace(batch, images=batch.images.clone())


def collect(loader: Loader, epoch: int = 1, start: int = 0) -> list[Batch]:
    return [kept(batch) for batch in loader.batches(epoch, start)]


def pipeline(name: str, *values: object) -> object:
    """A parameter of a test: a pipeline and further values. It is skipped if the pipeline is not installed."""
    return pytest.param(name, *values, marks=pytest.mark.skipif(not installed(name), reason=f"{name} is not installed"))
