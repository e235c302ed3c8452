"""Several views of each sample: crops of their own size and with draws of their own, for self-supervised training.

    Plan --views_of--> a plan for each view --(one size: in turn)--> Loader --MultiViewLoader--> a Batch of each view

All views have the same samples in the same order. Views of one size share a loader, which decodes them in turn.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from sdpnet.pipelines.contract import Batch, Loader, Source
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import BatchPlan, CropOptions, Plan
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["InterleavedPlan", "MultiViewLoader", "View", "views_of"]


@dataclass(frozen=True)
class View:
    """How a view of a sample is made.

    Attributes:
        image_size: pixels a side.
        crop: the random crop and flip; None is the central crop.
        augment: the augmentations of the device stage.
    """

    image_size: int
    crop: CropOptions | None
    augment: AugmentOptions


def views_of(plan: Plan, views: Sequence[View]) -> list[Plan]:
    """The plan of each view. The first view has the draws of `plan`, the others have their own.

    Raises:
        UserError: there is no view, or the views mix differently or over different sizes. Mixed views have one target,
            so they must be mixed from the same samples with the same weights.
    """
    if not views:
        raise UserError("views: must be at least one")
    first = views[0]
    for number, view in enumerate(views):
        if view.augment.mix != first.augment.mix:
            raise UserError(f"views: view {number} mixes images in another way than view 0, but they have one target")
        if view.augment.label_smoothing != first.augment.label_smoothing:
            raise UserError(f"views: view {number} has another label smoothing than view 0, but they have one target")
        if view.augment.mix.enabled and view.image_size != first.image_size:
            raise UserError(
                f"views: view {number} has {view.image_size} pixels and view 0 {first.image_size}: CutMix and MixUp "
                "over views of different sizes would give them different targets; use one size, or turn mixing off"
            )
    plans = []
    for number, view in enumerate(views):
        made = copy.copy(plan)
        made.view, made.image_size, made.crop = number, view.image_size, view.crop
        made.randaugment, made.erase, made.mix = view.augment.randaugment, view.augment.erase, view.augment.mix
        plans.append(made)
    return plans


class InterleavedPlan(Plan):
    """Plans of the same samples and image size in turn: batch `n * index + k` is batch `index` of plan k of n."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.__dict__.update(vars(plans[0]))
        assert len({(plan.image_size, plan.batch_size, plan.num_samples) for plan in plans}) == 1
        self._plans = tuple(plans)

    def __len__(self) -> int:
        return len(self._plans) * len(self._plans[0])

    def positions(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._plans[0].positions(index // len(self._plans))

    def batch(self, epoch: int, index: int) -> BatchPlan:
        index, turn = divmod(index, len(self._plans))
        return self._plans[turn].batch(epoch, index)

    def resized(self, image_size: int) -> Plan:
        return InterleavedPlan([plan.resized(image_size) for plan in self._plans])


class MultiViewLoader:
    """The loader of several views: yields a batch of each view of the same samples.

    Attributes:
        source: that of the first view, with the plan of that view.
        manifest: the shard set's.
        plans: the plan of each view.
    """

    def __init__(
        self, source: Source, views: Sequence[View], open_loader: Callable[[Source], Loader], manifest: Manifest
    ) -> None:
        """Opens a loader for each image size.

        Args:
            source: everything that a pipeline needs, with the plan that the views are made of.
            views: the views.
            open_loader: opens the loader of a source.
            manifest: the shard set's.

        Raises:
            UserError: the views do not fit together; see `views_of`.
        """
        self.plans = views_of(source.plan, views)
        self.source = source.with_plan(self.plans[0])
        self.manifest = manifest
        sizes = sorted({view.image_size for view in views}, reverse=True)
        self._views = [[number for number, view in enumerate(views) if view.image_size == size] for size in sizes]
        self._loaders: list[Loader] = []
        try:
            for numbers in self._views:
                plans = [self.plans[number] for number in numbers]
                plan = plans[0] if len(plans) == 1 else InterleavedPlan(plans)
                self._loaders.append(open_loader(source.with_plan(plan)))
        except BaseException:
            self.close()
            raise

    @property
    def one_iterator(self) -> bool:
        """Whether a new iterator ends the ones before it."""
        return any(loader.one_iterator for loader in self._loaders)

    @property
    def masked(self) -> Sequence[int]:
        """The ids of samples that the newest iterator has masked in any view."""
        return sorted({sample for loader in self._loaders for sample in loader.masked})

    def __len__(self) -> int:
        return len(self.plans[0])

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[tuple[int, Batch], None, None]:
        """Yields the batches `start`, `start + 1`, ... of an epoch: of each, all views, with the number of the view.

        Views come one by one, because a pipeline may reuse the memory of one for the next (see `Batch`).
        """
        with contextlib.ExitStack() as stack:
            streams = []
            for loader, numbers in zip(self._loaders, self._views, strict=True):
                stream = loader.batches(epoch, start * len(numbers))
                stack.callback(stream.close)
                streams.append(stream)
            for _ in range(start, len(self)):
                for stream, numbers in zip(streams, self._views, strict=True):
                    for number in numbers:
                        yield number, next(stream)

    def close(self) -> None:
        """Releases threads and memory."""
        for loader in self._loaders:
            loader.close()
