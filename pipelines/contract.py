"""What every pipeline promises: how it is given a plan, and the batches that it yields.

    shards + Plan --(one of the pipelines)--> Batch --(sdpnet.pipelines.augment.DeviceStage)--> images, targets for the
    model

A pipeline is an executor of the plan. All of them yield the same samples, labels, crop boxes and flips in the same
order; their pixels agree up to the decoders' and resizers' tolerance. `sdpnet.pipelines.loader.make_loader` opens one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from sdpnet.pipelines.options import DataOptions, ShardOptions
from sdpnet.pipelines.plan import BatchPlan, Plan
from sdpnet.pipelines.shards.layout import ShardReader
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["Batch", "Loader", "Source"]


@dataclass(frozen=True)
class Batch:
    """One batch of one process, on the loader's device.

    Attributes:
        images: uint8 (B, image_size, image_size, 3), RGB, values 0 to 255. Valid until the next batch is asked for.
        labels: int64 (B,).
        sample_ids: int64 (B,).
        valid: bool (B,); False marks what is neither scored nor trained on: padding, and samples that were masked.
        plan: this process's part of the plan, for the device stage.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    valid: torch.Tensor
    plan: BatchPlan


@dataclass(frozen=True)
class Source:
    """All that a pipeline needs.

    Attributes:
        reader: of the validated shard.
        plan: of all processes; its image size is the one that counts.
        shard: this process's part of each batch.
        device: where batches go.
        threads: decoding threads or workers of this process.
        options: how the executor works: prefetching, errors and its own section.
    """

    reader: ShardReader
    plan: Plan
    shard: ShardOptions
    device: torch.device
    threads: int
    options: DataOptions

    @property
    def prefetch_batches(self) -> int:
        """The number of batches decoded ahead of the one that is asked for, at first."""
        return self.options.prefetch[0]

    def with_plan(self, plan: Plan) -> Source:
        """The same for another plan, which has the same samples and batch size."""
        before = (self.plan.num_samples, self.plan.batch_size)
        assert before == (plan.num_samples, plan.batch_size), f"{before} != {plan.num_samples, plan.batch_size}"
        return replace(self, plan=plan)

    def batch_plan(self, epoch: int, index: int) -> BatchPlan:
        return self.plan.batch(epoch, index).shard(self.shard.rank, self.shard.world_size)

    def batch(self, images: torch.Tensor, plan: BatchPlan, labels: torch.Tensor | None = None) -> Batch:
        """A batch from this process's decoded images (uint8 (B, H, W, 3), any device) and plan.

        `labels` are the ones that the pipeline read itself, if it does; by default they are the reader's.

        Raises `ShardError` where a file of these samples was changed since it was opened: the images may be others.
        """
        self.reader.check(plan.sample_ids)

        def send(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        return Batch(
            images=images.to(self.device, non_blocking=True),
            labels=send(self.reader.labels[plan.sample_ids] if labels is None else labels.numpy()),
            sample_ids=send(plan.sample_ids),
            valid=send(plan.valid),
            plan=plan,
        )


class Loader(Protocol):
    """An iterable of batches with a length; `batches` starts anywhere."""

    source: Source
    manifest: Manifest

    @property
    def masked(self) -> Sequence[int]:
        """The samples that the newest iterator has yielded without pixels (`DataOptions.on_error`)."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def set_plan(self, plan: Plan) -> None:
        """Iterators made from now on follow this plan, which has the same samples and batch size.

        Threads, buffers and compiled code are kept; a plan of another image size may cost new ones.
        """
        ...

    def set_image_size(self, image_size: int) -> None:
        """Iterators made from now on yield images of this size. The plan's draws stay; boxes in output pixels follow
        the size."""
        ...

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        """The batches `start`, `start + 1`, ... of an epoch. Closing the iterator early ends all its work."""
        ...

    def close(self) -> None: ...
