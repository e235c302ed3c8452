"""The loader for any training loop: an iterable of images and targets on the device.

    arguments -> DataOptions, AugmentOptions -> a pipeline -> Batch -> DeviceStage -> images, targets

`train`, `sdpnet evaluate` and `sdpnet sheet` use the same object; they take its raw batches and its stage.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from sdpnet.loading.arguments import (
    Augment,
    argument_names,
    augment_options,
    classes_from,
    data_options,
    device_from,
    flag_from,
    integer_from,
    shard_from,
    split_role,
    views_from,
)
from sdpnet.loading.epochs import EpochIterator, Progress
from sdpnet.loading.feed import Feed
from sdpnet.loading.output import OutputOptions
from sdpnet.loading.state import make_state, order_of, place_in
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch, Source
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.plan import CropOptions, Plan
from sdpnet.pipelines.planning.sampling import SamplingRequest
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["ImageLoader"]


class ImageLoader:
    """Loads a split of a shard set as batches of images and targets that are ready for a model.

        loader = ImageLoader("SHARDS", "train", image_size=224, batch_size=256, augment="sdpnet_xl")
        for epoch in range(90):
            for images, targets in loader:
                ...

    Each iteration is one epoch: images (B, 3, image_size, image_size), normalised, on the device, and their targets.
    What was yielded stays valid as long as it is held, and may be changed. Everything random is a function of the seed,
    the epoch and the sample, so it is the same for any number of workers and processes and for every pipeline, and a
    training can continue at any batch (`state_dict`).

    Each new iterator is the next epoch, also after a `break`. The first one is epoch 0. `set_epoch` and
    `load_state_dict` choose another one.

    With the pipelines `native`, `torchvision` and `synthetic`, several iterators can be used at once; with `dali` and
    `ffcv`, a new iterator ends the ones before it. The state is that of the newest iterator. A loader belongs to the
    process that made it: after a fork, make another one.

    Args:
        data: the path of a shard set.
        split: the split's name in the shard set.
        train: True reads the split as for training: random crops and flips, shuffled, augmented. False reads it as for
            evaluation: centre crops, in order, not augmented. None is True for the split "train" alone.
        image_size: pixels a side of the images, 8 to 4,096.
        batch_size: the number of images in a batch of this process.
        augment: the augmentations of a training: the name of a recipe in `configs/` or the path of a .yaml file (its
            section `augment`, and its `data.crop` and `data.centre_fraction`), `AugmentOptions`, or a mapping of their
            keys such as `{"mix": {"mixup_alpha": 0.8}}`. "none" is crops, flips and normalisation alone. An evaluation
            only normalises, with the mean and standard deviation of these options.
        crop: the random resized crops of a training: `CropOptions` or a mapping of their keys. None takes those of the
            recipe, or the defaults.
        pipeline: "native", "dali", "ffcv", "torchvision", "synthetic", or "auto" for the fastest one that is installed.
        seed: any integer; decides everything random.
        device: the device of the batches: "cpu", "cuda:1", the number of a GPU, or a `torch.device`. None is the
            current CUDA device if there is one, else the CPU.
        rank: this process's number among those that share each global batch. None, with `world_size` None, takes both
            from `torch.distributed` if it is initialised, else there is one process.
        world_size: the number of these processes.
        drop_last: whether the incomplete last batch is left out. None is True in training, False in evaluation.
        padding: whether an incomplete last batch is filled up, so that all batches of all processes have the same size.
            Filled places have a target of zeros, or the index -100.
        dtype: the dtype of the images: `torch.float32`, `torch.float16`, `torch.bfloat16`, or `torch.uint8` for values
            from 0 to 255 that are not normalised.
        memory_format: `torch.channels_last` or `torch.contiguous_format`.
        targets: "soft" is float32 (B, num_classes): one-hot, smoothed or mixed. "index" is int64 (B,). None is "soft"
            in training and "index" in evaluation.
        return_ids: whether to yield (images, targets, sample_ids), with int64 ids (B,) on the device.
        num_workers: the number of decoding threads or worker processes; 0 divides this machine's cores among its
            processes.
        prefetch_batches: the number of batches that are decoded ahead, or "auto".
        on_error: what an image that cannot be decoded leads to: "raise" raises `ShardError`; "mask" makes it black,
            with a target of zeros or the index -100.
        order: the order of a training's epoch: "random", or "blocks", which keeps reads from a disk local.
        classes: the names of the classes that are used; None is all. Their numbers do not change. The name of a .txt
            file stands for the names in its lines.
        exclude: the names of classes that are not used, in the same form.
        subset: the share of each class's samples that is used, in (0, 1], or the numbers of the samples, int (K,), or
            the path of an .npy file with them.
        subset_seed: the seed of the share. A smaller share is a part of a larger one with the same seed.
        weights: draws the samples of a training with replacement: (N,), one number for each sample of the split, at
            least 0, or the path of an .npy file with them, or "balanced", which makes all classes equally likely. An
            epoch has as many draws as samples.
        repeats: how many times each sample of a training is used in a row, each time with draws of its own (repeated
            augmentation). An epoch keeps its length.
        views: several views of each sample of a training: their number, or for each of them a mapping with any of the
            keys image_size, crop and augment, whose other values are those of the loader. Images are then a tuple with
            a tensor for each view. Views that are mixed are mixed alike and must have one size.
        labels: labels instead of those of the split: int (N,) for other classes, or numbers (N, K) for targets of
            several classes or for a regression, which are handed out as float32 (B, K); or the path of an .npy file.

    Attributes:
        classes: the names of the classes; `classes[index]` is that of a target. With `labels`, they are numbers.
        num_classes: the width of soft targets.
        num_samples: the number of samples in an epoch.
        batch_size: the number of images in a batch of this process.
        device: the device of the batches.
        stage: makes images and soft targets of a raw batch of `batches`.

    Raises:
        ShardError: `data` is not a valid shard set, or has no such split.
        BackendMissingError: the pipeline's library cannot be imported.
        UserError: an argument is not valid, or does not go with another one.
    """

    classes: tuple[str, ...]
    num_classes: int
    num_samples: int
    batch_size: int
    device: torch.device
    stage: DeviceStage

    def __init__(
        self,
        data: str | os.PathLike[str],
        split: str = "train",
        *,
        train: bool | None = None,
        image_size: int = 224,
        batch_size: int = 256,
        augment: Augment = "none",
        crop: CropOptions | Mapping[str, Any] | None = None,
        pipeline: Literal["auto", "native", "torchvision", "ffcv", "dali", "synthetic"] = "auto",
        seed: int = 0,
        device: str | int | torch.device | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool | None = None,
        padding: bool = False,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        targets: Literal["soft", "index"] | None = None,
        return_ids: bool = False,
        num_workers: int = 0,
        prefetch_batches: int | Literal["auto"] = "auto",
        on_error: Literal["raise", "mask"] = "raise",
        order: Literal["random", "blocks"] = "random",
        classes: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        subset: Any = None,
        subset_seed: int = 0,
        weights: Any = None,
        repeats: int = 1,
        views: int | Sequence[Mapping[str, Any]] | None = None,
        labels: Any = None,
    ) -> None:
        with argument_names():
            role = split_role(split, train)
            augmentation, of_recipe = augment_options(augment)
            values = {
                **of_recipe,
                "image_size": image_size,
                "batch_size_per_gpu": batch_size,
                "pipeline": pipeline,
                "num_workers": num_workers,
                "prefetch_batches": prefetch_batches,
                "on_error": on_error,
                "order": order,
            }
            kind = targets if targets is not None else "soft" if role == "train" or labels is not None else "index"
            options = data_options(data, split, crop, values)
            sampling = SamplingRequest(
                classes=() if classes is None else classes_from(classes),
                exclude=() if exclude is None else exclude,
                subset=1.0 if subset is None else subset,
                subset_seed=integer_from("subset_seed", subset_seed),
                weights=weights,
                repeats=integer_from("repeats", repeats),
                labels=labels,
            )
            feed = Feed(
                options,
                augmentation,
                role,
                shard_from(rank, world_size),
                device_from(device),
                seed=integer_from("seed", seed),
                drop_last=drop_last if drop_last is None else flag_from("drop_last", drop_last),
                padding=flag_from("padding", padding),
                output=OutputOptions(dtype, memory_format, kind, return_ids),
                sampling=sampling,
                views=None if views is None else views_from(views, options, augmentation),
            )
        self._begin(feed)

    @classmethod
    def from_options(
        cls,
        data: DataOptions,
        augment: AugmentOptions,
        split: Literal["train", "val"],
        shard: ShardOptions,
        device: torch.device,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        num_classes: int | None = None,
        drop_last: bool | None = None,
        padding: bool = False,
        memory_format: torch.memory_format = torch.channels_last,
        targets: Literal["soft", "index"] = "soft",
        return_ids: bool = False,
    ) -> ImageLoader:
        """Makes a loader from the options of a config.

        Args:
            data: section `data`.
            augment: section `augment`.
            split: the split's role; `data.train_split` and `data.val_split` are the names.
            shard: this process's part of each batch.
            device: the device of the batches.
            seed: any integer.
            dtype: as for `ImageLoader`, like the following ones.
            num_classes: the width of soft targets, if it is larger than the number of classes in the shard set.
            drop_last: see above.
            padding: see above.
            memory_format: see above.
            targets: see above.
            return_ids: see above.

        Raises:
            UserError: as for `ImageLoader`; messages name keys of the config.
        """
        loader = cls.__new__(cls)
        loader._begin(
            Feed(
                data,
                augment,
                split,
                shard,
                device,
                seed=seed,
                num_classes=num_classes,
                drop_last=drop_last,
                padding=padding,
                output=OutputOptions(dtype, memory_format, targets, return_ids),
            )
        )
        return loader

    def _begin(self, feed: Feed) -> None:
        self._feed = feed
        self.classes = feed.loader.manifest.classes
        self.stage = feed.stages[0]
        self.num_classes = self.stage.num_classes
        self.num_samples = self.source.plan.num_samples
        self.batch_size = feed.batch_size
        self.device = self.source.device
        self._progress = Progress()
        self._running: weakref.WeakSet[EpochIterator[tuple[Any, ...]]] = weakref.WeakSet()
        self._closed = False
        self._process = os.getpid()

    @property
    def source(self) -> Source:
        """What the pipeline reads: the shards' reader, the plan, and this process's part."""
        return self._feed.loader.source

    @property
    def manifest(self) -> Manifest:
        """The manifest of the shard set."""
        return self._feed.loader.manifest

    @property
    def masked(self) -> Sequence[int]:
        """The ids of samples that the newest iterator has masked, with `on_error="mask"`."""
        return self._feed.loader.masked

    @property
    def image_size(self) -> int:
        """Pixels a side of the images of iterators that are made from now on."""
        return self.source.plan.image_size

    @property
    def epoch(self) -> int:
        """The epoch of the state: that of the newest iterator, or the next one when it has ended."""
        return self._progress.place[0]

    def __len__(self) -> int:
        """The number of batches of this process in an epoch."""
        return self._feed.num_batches

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """An iterator over an epoch: the next one, or what `set_epoch` or `load_state_dict` has chosen.

        The epoch begins with its first batch. An iterator that is never asked for one, as frameworks make it to see
        whether a loader can be iterated, is no epoch.

        Yields:
            (images, targets), or (images, targets, sample_ids) with `return_ids`. With `views`, images are a tuple.

        Raises:
            ShardError: an image cannot be decoded, or a file was changed since it was opened.
            UserError: the loader is closed, or was made in another process.
        """
        self._require_usable()
        if self._feed.loader.one_iterator:
            self._end_iterators("this iterator has ended, because its pipeline serves one at a time: a newer one began")
        iterator = EpochIterator(self._epoch())
        self._running.add(iterator)
        return iterator

    def _epoch(self) -> Generator[tuple[Any, ...], None, None]:
        number, epoch, start = self._progress.begin()
        with contextlib.closing(self._feed.results(epoch, start)) as results:
            for index in range(start, len(self)):
                # Nothing in this frame may keep what was yielded.
                yield self._handed_out(next(results), number, epoch, index + 1)
        self._progress.move(number, epoch + 1, 0)

    def _handed_out(self, result: tuple[Any, ...], number: int, epoch: int, batch: int) -> tuple[Any, ...]:
        self._progress.move(number, epoch, batch)
        return result

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        """Yields the raw batches `start`, `start + 1`, ... of an epoch, before the device stage.

        An incomplete last batch is padded. The state does not change. Raises `UserError` for a loader of several views.
        """
        self._require_usable()
        return self._feed.single("batches").batches(epoch, start)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iterator.

        It starts at the epoch's first batch, or, if a state of this very epoch was just loaded, at the batch of the
        state: training frameworks call `set_epoch` also at the beginning of an epoch that they continue.

        Args:
            epoch: the epoch, from 0.
        """
        number = integer_from("epoch", epoch, 0)
        require(number < 1 << 62, "epoch", number, "below 2**62")
        self._progress.choose(number)

    def set_image_size(self, image_size: int) -> None:
        """Sets the image size of iterators that are made from now on. The draws stay the same.

        Args:
            image_size: pixels a side, 8 to 4,096.
        """
        size = integer_from("image_size", image_size)
        require(8 <= size <= 4096, "image_size", size, "8 to 4,096 pixels")
        self._feed.single("set_image_size").set_image_size(size)

    def set_plan(self, plan: Plan) -> None:
        """Sets the plan of iterators that are made from now on. It must have the same samples and batch size."""
        self._feed.single("set_plan").set_plan(plan)
        self._feed.measure_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The place in the order of samples: after the newest batch that was yielded.

        Before the first iterator, and after `set_epoch` or `load_state_dict`, it is the place where the next iterator
        begins. The end of an epoch is the beginning of the next one.

        Returns:
            texts, numbers and truth values for JSON. It is the same in all processes whose loops are equally far, so
            that one of them can save it for all.
        """
        epoch, batch = self._progress.place
        if batch >= len(self.source.plan):  # the number of batches of all processes; this one may have one fewer
            epoch, batch = epoch + 1, 0
        return make_state(epoch, batch, self._order)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next iterator begin where a state was taken.

        The number of workers and of processes may differ from that of the loader that made the state if the global
        batch, `batch_size * world_size`, is the same.

        Args:
            state: what `state_dict` returned.

        Raises:
            UserError: it is no state, or one of other samples or of another order of them. The message names what
                differs. The loader does not change.
        """
        self._progress.restore(*place_in(state, self._order, len(self.source.plan)))

    @property
    def _order(self) -> dict[str, Any]:
        return order_of(
            self.source, self.manifest, self._feed.split, train=self.stage.train, views=self._feed.num_views
        )

    def close(self) -> None:
        """Ends all iterators, and releases threads and memory. What was yielded stays valid."""
        if not self._closed:
            self._closed = True
            self._end_iterators("this iterator has ended, because its loader was closed")
            self._feed.loader.close()

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(self, *of_error: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("an ImageLoader cannot be sent to another process or copied: make one there")

    def _end_iterators(self, reason: str) -> None:
        for iterator in list(self._running):
            iterator.end(reason)
        self._running.clear()

    def _require_usable(self) -> None:
        if self._closed:
            raise UserError("this ImageLoader is closed; make another one")
        if self._process != os.getpid():
            raise UserError("this ImageLoader was made by the process that this one was forked from; make one here")
