"""FFCV with half of the images raw, and torchvision's decoder on a GPU, as contestants of the benchmark."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_batches import config_for, installed, loader_for

from sdpnet.pipelines.benchmarks import peers
from sdpnet.pipelines.benchmarks.peers import TorchvisionGpuStream
from sdpnet.pipelines.benchmarks.process import BenchProcess, ContestantError
from sdpnet.pipelines.benchmarks.worker import Job
from sdpnet.pipelines.contract import Loader
from sdpnet.pipelines.machine import usable_cores
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.shards.beton import MODE_JPEG, MODE_RAW
from sdpnet.pipelines.shards.layout import open_split

ROOT = Path(__file__).resolve().parents[2]


def job(contestant: str, data: Path, **changes: Any) -> Job:
    facts = {"split": "train", "mode": "train", "image_size": 32, "batch_size": 5, "cores": tuple(usable_cores()[:1])}
    return Job(contestant, str(data), **{**facts, "device": "cpu", **changes})


def reference(data: Path) -> Loader:
    """The reference, on the plan of the benchmark, which has no augmentation."""
    config = config_for(data, "torchvision", batch_size_per_gpu=5, image_size=32)
    return loader_for(replace(config, augment=AugmentOptions()), "train")


def ids_of(data: Path, count: int) -> list[np.ndarray]:
    plan = reference(data).source.plan
    return [plan.batch(0, index % len(plan)).sample_ids for index in range(count)]


def half_raw(data: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sdpnet.pipelines.benchmarks.half_raw", "--data", str(data)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_torchvision_on_a_gpu_follows_the_plan(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU: the calls are the same. Its crops are near those of the reference."""
    made: list[torch.Tensor] = []
    stack = torch.stack
    monkeypatch.setattr(peers.torch, "stack", lambda images: made.append(stack(images)) or made[-1])
    with_stream = TorchvisionGpuStream(job("torchvision_gpu", shard_set))
    batches = with_stream.batches(4)
    got = [next(batches) for _ in range(4)]
    batches.close()
    assert [size for size, _ in got] == [5] * 4
    for (_, ids), images, batch in zip(got, made, reference(shard_set).batches(0), strict=False):
        assert ids.tolist() == batch.sample_ids.tolist()
        difference = images.permute(0, 2, 3, 1).int() - batch.images.int()
        assert difference.abs().float().mean() < 3


def test_it_is_measured_on_a_gpu_only(shard_set: Path) -> None:
    with BenchProcess(job("torchvision_gpu", shard_set)) as process, pytest.raises(ContestantError) as caught:
        process.start()
    assert str(caught.value) == "torchvision_gpu is measured with --device cuda only"


@pytest.mark.skipif(not installed("ffcv"), reason="ffcv is not installed")
@pytest.mark.slow
def test_ffcv_with_half_of_the_images_raw(shard_set: Path, tmp_path: Path) -> None:
    data = tmp_path / "shards"
    shutil.copytree(shard_set, data)
    with BenchProcess(job("ffcv_raw", data)) as process, pytest.raises(ContestantError) as caught:
        process.start()
    assert "-half-raw is not there; to make it: " in str(caught.value)
    done = half_raw(data)
    assert done.returncode == 0, done.stderr
    assert " of 24 images are raw; " in done.stdout and " times the encoded images; " in done.stdout
    _, before = open_split(data, "train")
    _, after = open_split(tmp_path / "shards-half-raw", "train")
    assert (after.sizes == before.sizes).all() and (after.labels == before.labels).all()
    assert set(after.modes.tolist()) == {MODE_JPEG, MODE_RAW}
    with BenchProcess(job("ffcv_raw", data)) as process:
        assert process.start().crops == "plan"
        measured = process.round(2)
    expected = [zlib.crc32(ids.tobytes()) for ids in ids_of(data, 4)[2:]]
    assert measured.checksums == tuple(expected)
    again = half_raw(data)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
