"""Short trainings, and their files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpnet.checkpoints.model import load_model
from sdpnet.reporting.reporter import Reporter

__all__ = [
    "EPOCHS",
    "STEPS_PER_EPOCH",
    "TIMES",
    "arguments",
    "metrics",
    "same_run",
    "stop_after",
    "weights",
]

TIMES = ("images_per_second", "data_wait_fraction", "step_ms", "gpu_memory_gb", "gpu_utilisation")

STEPS_PER_EPOCH, EPOCHS = 6, 2  # 24 images, 4 a step


def arguments(data: Path, out: Path, *settings: str, pipeline: str = "torchvision", config: str = "debug") -> list[str]:
    common = ["data.batch_size_per_gpu=4", "data.num_workers=1", f"train.epochs={EPOCHS}", "model.dropout=0.2"]
    command = ["--config", config, "--data", str(data), "--out", str(out), "--pipeline", pipeline]
    return command + [part for setting in (*common, *settings) for part in ("--set", setting)]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in TIMES} for m in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run)[0].state_dict()


def same_run(one: Path, other: Path) -> None:
    """Requires that two runs have the same metrics, without times, and the same weights."""
    assert metrics(one) == metrics(other)
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates Ctrl-C during a step, counted from 1 over the run."""
    advance, count = Reporter.advance, [0]

    def counting(self: Reporter) -> None:
        advance(self)
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Reporter, "advance", counting)
