"""The contract of all pipelines: how they get a plan, and which batches they yield.

    shards + Plan --(a pipeline)--> Batch --(sdpnet.pipelines.augment.DeviceStage)--> images and targets for the model

A pipeline executes the plan. All pipelines yield the same samples, labels, crop boxes and flips in the same order;
their pixels agree within the tolerance of decoders and resizers. `sdpnet.pipelines.loader.make_loader` opens one.
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
        images: uint8 (B, image_size, image_size, 3), RGB, values 0 to 255. On a CPU they are valid as long as they are
            held; on a GPU, until the next batch is asked for.
        labels: int64 (B,), or float32 (B, K) where `data.sampling.labels` has rows.
        sample_ids: int64 (B,).
        valid: bool (B,). False marks samples that are neither scored nor trained on: padding and masked samples.
        plan: this process's part of the plan, for the device stage.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    valid: torch.Tensor
    plan: BatchPlan


@dataclass(frozen=True)
class Source:
    """Everything that a pipeline needs.

    Attributes:
        reader: the reader of the validated shards.
        plan: the plan of all processes. Its `image_size` is used, not the one in `options`.
        shard: this process's part of each batch.
        device: the device of the batches.
        threads: the number of decoding threads or workers of this process.
        options: how the executor works: prefetching, errors, and the executor's own section.
        labels: int64 (N,) or float32 (N, K), the labels of all samples.
    """

    reader: ShardReader
    plan: Plan
    shard: ShardOptions
    device: torch.device
    threads: int
    options: DataOptions
    labels: np.ndarray

    @property
    def prefetch_batches(self) -> int:
        """The initial number of batches that are decoded ahead of the one that is asked for."""
        return self.options.prefetch[0]

    def with_plan(self, plan: Plan) -> Source:
        """A copy with another plan, which must have the same samples and batch size."""
        before = (self.plan.num_samples, self.plan.batch_size)
        assert before == (plan.num_samples, plan.batch_size), f"{before} != {plan.num_samples, plan.batch_size}"
        return replace(self, plan=plan)

    def batch_plan(self, epoch: int, index: int) -> BatchPlan:
        """This process's part of the plan of one batch."""
        return self.plan.batch(epoch, index).shard(self.shard.rank, self.shard.world_size)

    def batch(self, images: torch.Tensor, plan: BatchPlan) -> Batch:
        """Makes a batch on the loader's device.

        Args:
            images: uint8 (B, H, W, 3), decoded, on any device.
            plan: this process's part of the batch's plan.

        Raises:
            ShardError: a file of these samples was changed since it was opened, so the images may be wrong.
        """
        self.reader.check(plan.sample_ids)

        def send(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device, non_blocking=True)

        return Batch(
            images=images.to(self.device, non_blocking=True),
            labels=send(self.labels[plan.sample_ids]),
            sample_ids=send(plan.sample_ids),
            valid=send(plan.valid),
            plan=plan,
        )


class Loader(Protocol):
    """Yields the batches of any epoch, from any batch on.

    Attributes:
        one_iterator: whether an iterator must be closed before the next one is made.
    """

    one_iterator: bool
    source: Source
    manifest: Manifest

    @property
    def masked(self) -> Sequence[int]:
        """The ids of samples that the newest iterator has masked (see `DataOptions.on_error`)."""
        ...

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        ...

    def set_plan(self, plan: Plan) -> None:
        """Sets the plan of iterators that are made from now on. It must have the same samples and batch size.

        Threads, buffers and compiled code are kept; another image size may need new ones.
        """
        ...

    def set_image_size(self, image_size: int) -> None:
        """Sets the image size of iterators that are made from now on.

        The plan's draws stay the same; boxes in output pixels are computed for the size.
        """
        ...

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        """Yields the batches `start`, `start + 1`, ... of an epoch. Closing the generator early ends all its work."""
        ...

    def close(self) -> None:
        """Releases threads and memory."""
        ...
