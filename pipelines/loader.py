"""Opens a split of a shard set as a loader. All pipelines are opened by `make_loader`.

DataOptions, AugmentOptions, seed --make_plan--> Plan
shards, Plan --(the executor that `data.pipeline` names)--> Loader
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Literal

import numpy as np
import torch

from sdpnet.pipelines.contract import Loader, Source
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.executors.registry import PIPELINES, choose_pipeline, executor_of
from sdpnet.pipelines.executors.views import MultiViewLoader, View
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.plan import Plan
from sdpnet.pipelines.planning.sampling import Sampling, SamplingOptions, SamplingRequest
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["make_loader", "make_plan", "make_view_loader"]


def make_loader(
    data: DataOptions,
    augment: AugmentOptions,
    split: Literal["train", "val"],
    shard: ShardOptions,
    device: torch.device,
    *,
    seed: int,
    sampling: SamplingRequest | None = None,
    drop_last: bool | None = None,
) -> Loader:
    """Opens the shard set at `data.path` and returns the loader of its training or evaluation split.

    Args:
        data: the shard set's path and how it is read.
        augment: the augmentations that the plan draws for the device stage. Evaluation splits have none.
        split: the split's role. `data.train_split` and `data.val_split` are its names in the shard set.
        shard: this process's part of each batch.
        device: the device of the batches.
        seed: any integer; decides all draws of the plan.
        sampling: which samples are used, and how often; by default `data.sampling` says it.
        drop_last: whether the incomplete last batch is dropped; by default only in training.

    Returns:
        The loader. The classes in its manifest are those of its labels, also where `data.sampling.labels` gives others.

    Raises:
        ShardError: the files are not a valid shard set.
        BackendMissingError: the pipeline's library cannot be imported. The message names the cause, the command that
            fixes it, and the pipelines that would work. An explicit choice never falls back to another pipeline.
        UserError: the batch size does not fit the split, or `data.on_error` is "mask" with a pipeline that cannot mask.
    """
    source, manifest, make = _open(data, augment, split, shard, device, seed, sampling, drop_last)
    return make(source, manifest)


def make_view_loader(
    data: DataOptions,
    views: Sequence[View],
    shard: ShardOptions,
    device: torch.device,
    *,
    seed: int,
    sampling: SamplingRequest | None = None,
    drop_last: bool | None = None,
) -> MultiViewLoader:
    """Opens the training split of the shard set at `data.path`, and returns the loader of several views of its samples.

    Arguments and errors are those of `make_loader`. Sizes, crops and augmentations are those of the views.
    """
    augment = views[0].augment if views else AugmentOptions()
    source, manifest, make = _open(data, augment, "train", shard, device, seed, sampling, drop_last)
    return MultiViewLoader(source, views, lambda source: make(source, manifest), manifest)


def _open(
    data: DataOptions,
    augment: AugmentOptions,
    split: Literal["train", "val"],
    shard: ShardOptions,
    device: torch.device,
    seed: int,
    sampling: SamplingRequest | None,
    drop_last: bool | None,
) -> tuple[Source, Manifest, Callable[[Source, Manifest], Loader]]:
    """Opens a split, makes its plan and imports its pipeline; see `make_loader`."""
    if data.pipeline not in ("auto", *PIPELINES):
        raise UserError(f"data.pipeline = {data.pipeline!r}: must be one of auto, {', '.join(PIPELINES)}")
    if not data.path:
        raise UserError("no shard set given: pass --data SHARDS (made by sdpnet convert)")
    name = data.train_split if split == "train" else data.val_split
    manifest, reader = open_split(data.path, name)
    if reader.num_samples == 0:
        raise UserError(f"{reader.path}: the split has no samples")
    train = split == "train"
    auto = data.pipeline == "auto"
    pipeline = choose_pipeline(device, manifest.splits[name].format) if auto else data.pipeline
    if data.on_error == "mask" and not PIPELINES[pipeline].can_mask:
        able = " or ".join(name for name, executor in PIPELINES.items() if executor.can_mask)
        raise UserError(f"data.on_error = 'mask': pipeline {pipeline!r} cannot mask, only --pipeline {able} can")
    request = data.sampling.request(train=train) if sampling is None else sampling
    with _config_keys(train=train) if sampling is None else contextlib.nullcontext():
        chosen = request.resolve(manifest.classes, reader.labels, reader.path)
    if chosen.labels is not None:
        if chosen.labels.ndim == 2 and train and augment.label_smoothing:
            raise UserError(
                f"augment.label_smoothing = {augment.label_smoothing}: needs one class a sample, but labels has rows"
            )
        manifest = replace(manifest, classes=tuple(map(str, range(_num_classes(chosen.labels)))))
    plan = make_plan(
        data,
        augment,
        reader.sizes,
        train=train,
        world_size=shard.world_size,
        seed=seed,
        sampling=chosen,
        drop_last=drop_last,
    )
    labels = reader.labels if chosen.labels is None else chosen.labels
    source = Source(reader, plan, shard, device, data.threads(shard.local_world_size), data, labels)
    return source, manifest, executor_of(pipeline)


@contextlib.contextmanager
def _config_keys(*, train: bool) -> Iterator[None]:
    """Names the keys of the config in the errors of `SamplingRequest.resolve`."""
    try:
        yield
    except UserError as error:
        key, rest = re.match(r"(\w+)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
        if key not in {field.name for field in fields(SamplingOptions)}:
            raise
        key = "val_labels" if key == "labels" and not train else key
        raise UserError(f"data.sampling.{key}{rest}") from None


def _num_classes(labels: np.ndarray) -> int:
    return labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1


def make_plan(
    data: DataOptions,
    augment: AugmentOptions,
    sizes: np.ndarray,
    *,
    train: bool,
    world_size: int,
    seed: int,
    sampling: Sampling | None = None,
    drop_last: bool | None = None,
) -> Plan:
    """Makes the plan of a training or evaluation split.

    Args:
        data: batch size, image size, order and crops.
        augment: the augmentations to draw; ignored for evaluation.
        sizes: int32 (N, 2), the height and width of each image in pixels.
        train: whether the plan is for training.
        world_size: the number of processes.
        seed: any integer.
        sampling: which samples are used; by default all, once.
        drop_last: whether the incomplete last batch is dropped; by default only in training.

    Raises:
        UserError: a training batch has more samples than are used; weights or repeats are given for an evaluation, or
            weights with an order by blocks; or a batch is of odd size with MixUp or CutMix, which mix pairs.
    """
    batch_size = data.batch_size_per_gpu * world_size
    sampling = sampling or Sampling()
    num_samples = sampling.num_samples(len(sizes))
    if not train:
        if sampling.cumulative is not None or sampling.repeats > 1:
            what = "weights" if sampling.cumulative is not None else "repeats"
            raise UserError(f"{what}: only for training; an evaluation uses each sample once")
        return Plan(
            seed=seed,
            sizes=sizes,
            batch_size=batch_size,
            image_size=data.image_size,
            order="sequential",
            centre_fraction=data.centre_fraction,
            drop_last=drop_last,
            sampling=sampling,
        )
    if sampling.repeats > batch_size:
        raise UserError(f"repeats = {sampling.repeats}: must be at most {batch_size}, the samples of a global batch")
    if sampling.cumulative is not None and data.order != "random":
        raise UserError(f"order = {data.order!r}: weights draws samples at random; omit one of them")
    if augment.mix.enabled and data.batch_size_per_gpu % 2:
        raise UserError(
            f"data.batch_size_per_gpu = {data.batch_size_per_gpu}: MixUp and CutMix mix pairs: must be even"
        )
    if num_samples < batch_size and drop_last is not False:
        chosen = " that data.sampling chooses" if num_samples < len(sizes) else ""
        raise UserError(
            f"the training split has {num_samples} samples{chosen}, fewer than one batch "
            f"(data.batch_size_per_gpu {data.batch_size_per_gpu} x {world_size} processes); lower the batch size"
        )
    return Plan(
        seed=seed,
        sizes=sizes,
        batch_size=batch_size,
        image_size=data.image_size,
        order=data.order,
        crop=data.crop,
        randaugment=augment.randaugment,
        erase=augment.erase,
        mix=augment.mix,
        drop_last=drop_last,
        sampling=sampling,
    )
