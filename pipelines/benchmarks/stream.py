"""A pipeline as the benchmark runs it: the first batches of one epoch, as often as it takes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from sdpnet.pipelines.benchmarks.worker import Job
from sdpnet.pipelines.contract import AugmentOptions, DataOptions, ShardOptions, make_loader
from sdpnet.pipelines.plan import Plan

__all__ = ["BenchConfig", "PipelineStream", "RepeatedPlan", "open_pipeline"]


class BenchConfig:
    """What `make_loader` reads of a config."""

    def __init__(self, job: Job) -> None:
        self.seed = job.seed
        self.augment = AugmentOptions()
        self.data = DataOptions(
            path=job.data,
            pipeline=job.contestant,  # type: ignore[arg-type]
            train_split=job.split,
            val_split=job.split,
            image_size=job.image_size,
            batch_size_per_gpu=job.batch_size,
            num_workers=len(job.cores),
        )


class RepeatedPlan(Plan):
    """`count` batches: those of a plan, from the first again after the last, so that a small split does for a long run.

    Where the plan starts again the decisions are the same too: a sample has one box, whichever batch is in the making.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        self.__dict__.update(vars(plan))
        self._period, self._count = len(plan), count

    def __len__(self) -> int:
        return self._count

    def batch_ids(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        return super().batch_ids(epoch, index % self._period)


class PipelineStream:
    """See `sdpnet.pipelines.benchmarks.worker.Stream`."""

    crops = "plan"

    def __init__(self, job: Job) -> None:
        config = BenchConfig(job)
        split: Literal["train", "val"] = "train" if job.mode == "train" else "val"
        self._loader = make_loader(config, split, ShardOptions(), torch.device(job.device))
        self._plan = self._loader.source.plan
        # Made beyond those asked for, so that the last ones are made as all others are: with the next under way.
        self._more = config.data.prefetch[1] + len(job.cores) + 3

    def batches(self, count: int) -> Generator[tuple[int, np.ndarray | None], None, None]:
        plan = RepeatedPlan(self._plan, count + self._more)
        self._loader.source = replace(self._loader.source, plan=plan)
        batches = self._loader.batches()
        try:
            for batch in batches:
                yield len(batch.images), batch.plan.sample_ids
        finally:
            batches.close()


def open_pipeline(job: Job) -> PipelineStream:
    return PipelineStream(job)
