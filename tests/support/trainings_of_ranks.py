"""Trainings of several ranks, which record what each rank saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forked import run_group
from ranks import run_trainings

__all__ = ["GLOBAL_BATCH", "STEPS", "case", "in_order", "resumed", "run"]

GLOBAL_BATCH, STEPS = 4, 6  # 24 images


def case(
    data: Path, out: Path, world_size: int, *settings: str, pipeline: str = "torchvision", stop: Any = None
) -> dict[str, Any]:
    """One training for `run_trainings`: two epochs, global batches of four, in two accumulated halves."""
    batch = GLOBAL_BATCH // 2 // world_size
    common = [f"data.batch_size_per_gpu={batch}", "train.accumulate=2", "data.num_workers=1", "train.epochs=2"]
    common += ["model.dropout=0.2", "optim.warmup_epochs=0.5", "train.checkpoint_interval=4", "ema.decay=0.9"]
    common += ["augment.mix.mixup_alpha=0", "augment.mix.cutmix_alpha=0"] if batch % 2 else []
    arguments = ["--config", "debug", "--data", str(data), "--out", str(out), "--pipeline", pipeline]
    arguments += [part for setting in (*common, *settings) for part in ("--set", setting)]
    return {"arguments": arguments, "stop": stop}


def resumed(of: dict[str, Any]) -> dict[str, Any]:
    return {"arguments": [*of["arguments"], "--resume"], "stop": None}


def run(cases: list[dict[str, Any]], world_size: int, scratch: Path) -> list[list[dict[str, Any]]]:
    """Of each case and process: exit status, and the samples of each step."""
    results = run_group(run_trainings, cases, world_size=world_size, scratch=scratch)
    return [list(of_ranks) for of_ranks in zip(*results, strict=True)]


def in_order(of_ranks: list[dict[str, Any]], batch: int) -> list[list[int]]:
    """The samples of each step in the order of the plan: rank after rank in each of its batches."""
    steps = []
    for of_step in zip(*(rank["samples"] for rank in of_ranks), strict=True):
        size = batch // len(of_ranks)
        pieces = [[samples[i : i + size] for samples in of_step] for i in range(0, len(of_step[0]), size)]
        steps.append([sample for piece in pieces for part in piece for sample in part])
    return steps
