"""Runs a pipeline for the benchmark: yields the first batches of one epoch, repeated as often as needed."""

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
    """The options of a pipeline for this job."""
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
    """The plan that pipelines follow in this job, for contestants that are not pipelines.

    `sizes` are the images' heights and widths, int32 (N, 2).
    """
    return make_plan(data_options(job), AugmentOptions(), sizes, train=job.train, world_size=1, seed=job.seed)


class RepeatedPlan(Plan):
    """A plan of `count` batches that repeats the batches of another plan, so that a small split suffices.

    Repeated batches have the same draws. A sample therefore has one box, whichever of its batches is being decoded.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        self.__dict__.update(vars(plan))
        self._period, self._count = len(plan), count

    def __len__(self) -> int:
        return self._count

    def positions(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return super().positions(index % self._period)


class PipelineStream:
    """See `sdpnet.pipelines.benchmarks.worker.Stream`."""

    crops = "plan"

    def __init__(self, job: Job) -> None:
        data, device = data_options(job), torch.device(job.device)
        split: Literal["train", "val"] = "train" if job.train else "val"
        self._loader = make_loader(data, AugmentOptions(), split, ShardOptions(), device, seed=job.seed)
        self._plan = self._loader.source.plan
        # More batches are decoded than requested, so that the last ones are decoded like the others, beside the next.
        self._extra = data.prefetch[1] + len(job.cores) + 3

    def batches(self, count: int) -> Generator[tuple[int, np.ndarray | None], None, None]:
        self._loader.set_plan(RepeatedPlan(self._plan, count + self._extra))
        batches = self._loader.batches()
        try:
            for batch in batches:
                yield len(batch.images), batch.plan.sample_ids
        finally:
            batches.close()


def open_pipeline(job: Job) -> PipelineStream:
    return PipelineStream(job)
