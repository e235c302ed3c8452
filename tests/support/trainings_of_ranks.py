"""Trainings of several processes, with a record of the samples in each process."""

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
    """One training for `run_trainings`: two epochs with global batches of four, accumulated in two halves."""
    batch = GLOBAL_BATCH // 2 // world_size
    common = [f"data.batch_size_per_gpu={batch}", "train.accumulate=2", "data.num_workers=1", "train.epochs=2"]
    common += ["model.dropout=0.2", "optim.warmup_epochs=0.5", "train.checkpoint_interval=4", "ema.decay=0.9"]
    common += ["augment.mix.mixup_alpha=0", "augment.mix.cutmix_alpha=0"] if batch % 2 else []
    arguments = ["--config", "debug", "--data", str(data), "--out", str(out), "--pipeline", pipeline]
    arguments += [part for setting in (*common, *settings) for part in ("--set", setting)]
    return {"arguments": arguments, "stop": stop}


def resumed(case: dict[str, Any]) -> dict[str, Any]:
    """The same training with `--resume`."""
    return {"arguments": [*case["arguments"], "--resume"], "stop": None}


def run(cases: list[dict[str, Any]], world_size: int, scratch: Path) -> list[list[dict[str, Any]]]:
    """The exit status and the samples of each step, for each case and process."""
    results = run_group(run_trainings, cases, world_size=world_size, scratch=scratch)
    return [list(ranks) for ranks in zip(*results, strict=True)]


def in_order(ranks: list[dict[str, Any]], batch: int) -> list[list[int]]:
    """The samples of each step in the order of the plan: in each batch, the samples of rank 0, rank 1, and so on."""
    steps = []
    for parts in zip(*(rank["samples"] for rank in ranks), strict=True):
        size = batch // len(ranks)
        pieces = [[samples[i : i + size] for samples in parts] for i in range(0, len(parts[0]), size)]
        steps.append([sample for piece in pieces for part in piece for sample in part])
    return steps
