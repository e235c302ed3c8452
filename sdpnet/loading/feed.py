"""What a loader hands out: the batches of a pipeline, finished by the device stage; of one view or of several.

a pipeline -> Batch (of each view) -> DeviceStage (of each view) -> images, targets
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch

from sdpnet.loading.output import OutputOptions, finish
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch, Loader
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.executors.views import MultiViewLoader, View
from sdpnet.pipelines.loader import make_loader, make_view_loader
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.planning.sampling import SamplingRequest

__all__ = ["Feed"]


class Feed:
    """An opened split, and the stages that finish its batches.

    Args:
        data: section `data` of a config.
        augment: section `augment`.
        role: whether the split is read as for training or as for evaluation.
        shard: this process's part of each batch.
        device: the device of the batches.
        seed: any integer.
        output: the form of what is handed out.
        num_classes: the width of soft targets; None takes the number of classes.
        drop_last: whether the incomplete last batch is left out; None is in training, unless `padding` fills it up.
        padding: whether the incomplete last batch is filled up.
        sampling: which samples are used; None is what `data` says.
        views: the views of each sample; None yields no views.

    Attributes:
        loader: the pipeline's loader.
        split: the split's name.
        stages: the stage of each view; one without views.
        num_views: the number of views, or 0.
        batch_size: the number of images in a batch of this process.
        num_batches: the number of batches of this process in an epoch.

    Raises:
        UserError: the options do not go together, or the data cannot be opened.
    """

    loader: Loader | MultiViewLoader

    def __init__(
        self,
        data: DataOptions,
        augment: AugmentOptions,
        role: Literal["train", "val"],
        shard: ShardOptions,
        device: torch.device,
        *,
        seed: int,
        output: OutputOptions,
        num_classes: int | None = None,
        drop_last: bool | None = None,
        padding: bool = False,
        sampling: SamplingRequest | None = None,
        views: Sequence[View] | None = None,
    ) -> None:
        train = role == "train"
        augments = [augment] if views is None else [view.augment for view in views]
        for of_view in augments:
            output.check(of_view, train=train)
        if padding and drop_last:
            raise UserError("padding = True: fills up the batch that drop_last = True leaves out; choose one of them")
        if views is not None and not train:
            raise UserError("views: only for training; an evaluation has one central crop of each image")
        chosen: dict[str, Any] = {
            "seed": seed,
            "sampling": sampling,
            "drop_last": drop_last if drop_last is not None else train and not padding,
        }
        self.split = data.train_split if train else data.val_split
        self.num_views = 0 if views is None else len(views)
        self.batch_size = data.batch_size_per_gpu
        self._output, self._padding = output, padding
        if views is None:
            self.loader = make_loader(data, augment, role, shard, device, **chosen)
        else:
            self.loader = make_view_loader(data, views, shard, device, **chosen)
        width = num_classes or self.loader.manifest.num_classes
        self.stages = [DeviceStage(of_view, width, output.stage_dtype, train=train) for of_view in augments]
        try:
            self._check()
            self.measure_epoch()
        except BaseException:
            self.loader.close()
            raise

    def _check(self) -> None:
        source = self.loader.source
        if source.labels.ndim == 2 and self._output.targets == "index":
            raise UserError("targets = 'index': labels has rows of numbers, not classes; use targets='soft'")
        if len(source.plan) == 0:
            raise UserError(
                f"drop_last = True: the split has {source.plan.num_samples} samples, fewer than one batch of "
                f"{source.plan.batch_size}; lower batch_size, or use drop_last=False"
            )

    def measure_epoch(self) -> None:
        """Computes the number of batches in an epoch of this process, and the size of the last one."""
        plan, rank = self.loader.source.plan, self.loader.source.shard.rank
        valid = plan.batch_ids(0, len(plan) - 1)[1]  # what fills up the last batch comes last in it
        own = valid[rank * self.batch_size : (rank + 1) * self.batch_size]
        self._last_size = self.batch_size if self._padding else int(own.sum())
        self.num_batches = len(plan) - (self._last_size == 0)

    def single(self, what: str) -> Loader:
        """The loader of the only view. Raises `UserError`, which begins with `what`, if there are several."""
        if isinstance(self.loader, MultiViewLoader):
            raise UserError(f"{what}: not with views; iterate over the loader")
        return self.loader

    def results(self, epoch: int, start: int) -> Generator[tuple[Any, ...], None, None]:
        """Yields (images, targets) or (images, targets, sample_ids) of the batches of an epoch from `start` on."""
        count, last, last_size = self.num_batches, len(self.loader.source.plan) - 1, self._last_size
        with contextlib.closing(self._batches(epoch, start)) as batches:
            for index in range(start, count):
                # Nothing in this frame may keep what was yielded.
                yield self._result(batches, last_size if index == last else self.batch_size)

    def _batches(self, epoch: int, start: int) -> Generator[tuple[int, Batch], None, None]:
        """The raw batches of an epoch, each with the number of its view."""
        if isinstance(self.loader, MultiViewLoader):
            yield from self.loader.batches(epoch, start)
            return
        count = len(self.loader.source.plan)
        with contextlib.closing(self.loader.batches(epoch, start)) as batches:
            for _ in range(start, count):
                yield 0, next(batches)

    def _result(self, batches: Generator[tuple[int, Batch], None, None], size: int) -> tuple[Any, ...]:
        """The tensors of the next batch, of all views."""
        finished: dict[int, tuple[torch.Tensor, ...]] = {}
        for _ in self.stages:
            view, batch = next(batches)
            finished[view] = finish(batch, self.stages[view], self._output, size)
        if not self.num_views:
            return finished[0]
        _, *others = finished[0]
        return tuple(finished[view][0] for view in range(self.num_views)), *others
