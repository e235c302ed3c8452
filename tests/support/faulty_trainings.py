"""Trainings of six steps, and their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline_batches import installed

from sdpnet.checkpoints.model import latest_checkpoint, load_checkpoint
from sdpnet.train import main

__all__ = ["BAD_STEP", "LAST_STEP", "PIPELINE", "arguments", "final", "refused"]

PIPELINE = "native" if installed("native") else "torchvision"

BAD_STEP, LAST_STEP = 4, 6


def arguments(data: Path, out: Path, *settings: str) -> list[str]:
    """The arguments for one epoch of six steps, with averaged weights and checkpoints after steps 2, 4 and 6."""
    common = ["data.batch_size_per_gpu=4", "data.num_workers=1", "train.checkpoint_interval=2", "ema.decay=0.9"]
    common += ["train.keep_checkpoints=9", "train.async_checkpoints=false"]
    command = ["--config", "debug", "--data", str(data), "--out", str(out), "--pipeline", PIPELINE]
    return command + [part for setting in (*common, *settings) for part in ("--set", setting)]


def final(run: Path) -> dict[str, Any]:
    """The newest checkpoint of a run."""
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Requires that a command is refused, and returns its one line of error."""
    capsys.readouterr()
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 400, err
    return err
