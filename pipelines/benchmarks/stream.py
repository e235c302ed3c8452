"""A pipeline as the benchmark runs it: the first batches of one epoch, as often as it takes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

import numpy as np
import torch

from sdpnet.pipelines.benchmarks.worker import Job
from sdpnet.pipelines.loader import make_loader, make_plan
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.plan import Plan

__all__ = ["PipelineStream", "RepeatedPlan", "data_options", "job_plan", "open_pipeline"]


def data_options(job: Job) -> DataOptions:
    """The options of a pipeline that does this job."""
    return DataOptions(
        path=job.data,
        pipeline=job.contestant,  # type: ignore[arg-type]
        train_split=job.split,
        val_split=job.split,
        image_size=job.image_size,
        batch_size_per_gpu=job.batch_size,
        num_workers=len(job.cores),
    )


def job_plan(job: Job, sizes: np.ndarray) -> Plan:
    """The plan that the pipelines follow in this job, for contestants that are none of them; sizes: int32 (N, 2)."""
    return make_plan(data_options(job), AugmentOptions(), sizes, train=job.train, world_size=1, seed=job.seed)


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
        data, device = data_options(job), torch.device(job.device)
        split: Literal["train", "val"] = "train" if job.train else "val"
        self._loader = make_loader(data, AugmentOptions(), split, ShardOptions(), device, seed=job.seed)
        self._plan = self._loader.source.plan
        # Made beyond those asked for, so that the last ones are made as all others are: with the next under way.
        self._more = data.prefetch[1] + len(job.cores) + 3

    def batches(self, count: int) -> Generator[tuple[int, np.ndarray | None], None, None]:
        self._loader.set_plan(RepeatedPlan(self._plan, count + self._more))
        batches = self._loader.batches()
        try:
            for batch in batches:
                yield len(batch.images), batch.plan.sample_ids
        finally:
            batches.close()


def open_pipeline(job: Job) -> PipelineStream:
    return PipelineStream(job)
