"""The `synthetic` pipeline: yields one batch of noise that is already on the device.

It shows what a training step costs when data costs nothing.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from sdpnet.pipelines.contract import Batch, Source
from sdpnet.pipelines.executors.planned import PlannedLoader
from sdpnet.pipelines.plan import Plan
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["SyntheticLoader", "make"]


class SyntheticLoader(PlannedLoader):
    """The loader of the `synthetic` pipeline; see `sdpnet.pipelines.contract.Loader`.

    Labels, sample ids and plans are the real ones; only the pixels are noise.
    """

    masked: tuple[int, ...] = ()

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self.source = source
        self.manifest = manifest
        self.set_plan(source.plan)

    def set_plan(self, plan: Plan) -> None:
        source = self.source = self.source.with_plan(plan)
        shape = (plan.batch_size // source.shard.world_size, plan.image_size, plan.image_size, 3)
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(source.device)

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        for index in range(start, len(self)):
            yield self.source.batch(self._images, self.source.batch_plan(epoch, index))

    def close(self) -> None:
        """Does nothing."""


def make(source: Source, manifest: Manifest) -> SyntheticLoader:
    return SyntheticLoader(source, manifest)
