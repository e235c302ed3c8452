"""What every pipeline promises: options in, batches out, and `make_loader`, the only door.

    shards + Plan --(one of the pipelines)--> Batch --(sdpnet.pipelines.augment.DeviceStage)--> images, targets for the
    model

A pipeline is an executor of the plan. All of them yield the same samples, labels, crop boxes and flips in the same
order; their pixels agree up to the decoders' and resizers' tolerance.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch

from sdpnet.pipelines.errors import BackendMissingError, UserError, require
from sdpnet.pipelines.machine import core_share
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.plan import ERASE_MODES, BatchPlan, CropOptions, EraseOptions, MixOptions, Order, Plan
from sdpnet.pipelines.planning.policies import RandAugmentOptions
from sdpnet.pipelines.shards.layout import ShardReader, open_split
from sdpnet.pipelines.shards.manifest import Manifest
from sdpnet.pipelines.terminal.remedy import install, install_extra, rebuild, set_up_again

__all__ = [
    "PIPELINES",
    "AugmentOptions",
    "Batch",
    "DataOptions",
    "Loader",
    "LoaderConfig",
    "ShardOptions",
    "Source",
    "choose_pipeline",
    "make_loader",
    "make_plan",
    "why_missing",
]

# name -> (module, what must be importable, how to get it); `native` needs its library instead
PIPELINES: Final[dict[str, tuple[str, str, Callable[[], str]]]] = {
    "native": ("sdpnet.pipelines.executors.native", "", rebuild),
    "torchvision": ("sdpnet.pipelines.executors.torchvision", "torchvision", lambda: install("torchvision")),
    "ffcv": ("sdpnet.pipelines.executors.ffcv", "ffcv", lambda: set_up_again(install_extra("ffcv"))),
    "dali": ("sdpnet.pipelines.executors.dali", "nvidia.dali", lambda: set_up_again(install_extra("dali"))),
    "synthetic": ("sdpnet.pipelines.executors.synthetic", "torch", lambda: install("torch")),
}


LARGEST_IMAGE: Final = 4096  # pixels a side
LARGEST_BATCH: Final = 1 << 20
_PREFETCH: Final = (3, 8)  # data.prefetch_batches = auto


@dataclass(frozen=True)
class ShardOptions:
    """Which part of every batch belongs to this process, and how many processes share this machine's cores."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of world size {self.world_size}: need 0 <= rank < world_size")


@dataclass(frozen=True)
class DataOptions:
    """Section `data` of a config: where the shards are and how they are read.

    `path` is a shard set; `batch_size_per_gpu` counts one micro-batch of one process; `num_workers` 0 means this
    machine's cores, divided among its processes; `centre_fraction` is the share of the shorter side that evaluation
    keeps (224 / 256 by custom). An image that cannot be decoded is an error, or with `on_error` "mask" (native only) a
    black one that contributes neither loss nor score, though batch norms see it. `prefetch_batches` are decoded ahead
    of the one that is asked for: auto begins with 3, and native goes on to 8 where the step waits for batches that
    could have been decoded before. `read_ahead_batches` (native only; 0: off) says how many batches before its decoding
    a batch is asked for from the disk. `hw_decoder_load` (dali only, on GPUs with a JPEG unit) is the most of a batch
    that this unit decodes, beside CUDA; DALI says that the best share must be found by trying.
    """

    path: str = ""
    pipeline: Literal["auto", "native", "torchvision", "ffcv", "dali", "synthetic"] = "auto"
    train_split: str = "train"
    val_split: str = "val"
    image_size: int = 224
    batch_size_per_gpu: int = 256
    num_workers: int = 0
    prefetch_batches: Literal["auto"] | int = "auto"
    read_ahead_batches: int = 4
    hw_decoder_load: float = 0.65
    on_error: Literal["raise", "mask"] = "raise"
    order: Order = "random"
    centre_fraction: float = 0.875
    crop: CropOptions = field(default_factory=CropOptions)

    def __post_init__(self) -> None:
        size, batch = self.image_size, self.batch_size_per_gpu
        require(8 <= size <= LARGEST_IMAGE, "data.image_size", size, f"8 to {LARGEST_IMAGE:,} pixels")
        require(1 <= batch <= LARGEST_BATCH, "data.batch_size_per_gpu", batch, f"1 to {LARGEST_BATCH:,}")
        require(
            0 <= self.num_workers <= 4096,
            "data.num_workers",
            self.num_workers,
            "0 (one a core of this machine) or more, at most 4,096",
        )
        least, _ = self.prefetch
        require(1 <= least <= 4096, "data.prefetch_batches", self.prefetch_batches, "1 to 4,096, or auto")
        ahead = self.read_ahead_batches
        require(0 <= ahead <= 4096, "data.read_ahead_batches", ahead, "0 (off) or more, at most 4,096")
        require(0 <= self.hw_decoder_load <= 1, "data.hw_decoder_load", self.hw_decoder_load, "in [0, 1]")
        require(self.on_error in ("raise", "mask"), "data.on_error", self.on_error, "raise or mask")
        require(self.order != "sequential", "data.order", self.order, "random or blocks (evaluation is sequential)")
        require(0 < self.centre_fraction <= 1, "data.centre_fraction", self.centre_fraction, "in (0, 1]")
        scale, ratio = self.crop.scale, self.crop.ratio
        require(0 < scale[0] <= scale[1] <= 1, "data.crop.scale", scale, "0 < low <= high <= 1")
        require(0 < ratio[0] <= ratio[1], "data.crop.ratio", ratio, "0 < low <= high")
        require(
            0 <= self.crop.flip_probability <= 1, "data.crop.flip_probability", self.crop.flip_probability, "in [0, 1]"
        )

    @property
    def prefetch(self) -> tuple[int, int]:
        """Batches decoded ahead: at first, and at most."""
        return _PREFETCH if self.prefetch_batches == "auto" else (self.prefetch_batches, self.prefetch_batches)

    def threads(self, processes: int = 1) -> int:
        """Of each of `processes` on this machine."""
        return self.num_workers or core_share(processes)


@dataclass(frozen=True)
class AugmentOptions:
    """Section `augment` of a config: the device stage. `mean` and `std`: of RGB in [0, 1], ImageNet's by default.

    `fused` says whether Triton kernels do the pixels: auto: on GPUs of compute capability 7.5 and more, if Triton
    can be imported; verify: likewise, and the first batch is compared with the reference's; off: never.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    randaugment: RandAugmentOptions = field(default_factory=RandAugmentOptions)
    erase: EraseOptions = field(default_factory=EraseOptions)
    mix: MixOptions = field(default_factory=MixOptions)
    label_smoothing: float = 0.0
    fused: Literal["auto", "verify", "off"] = "auto"

    def __post_init__(self) -> None:
        of_levels = "(levels from 0 to 255 are divided by 255 first)"
        require(all(0 <= mean <= 1 for mean in self.mean), "augment.mean", self.mean, f"in [0, 1] {of_levels}")
        require(all(1e-6 <= std <= 1 for std in self.std), "augment.std", self.std, f"in [1e-6, 1] {of_levels}")
        require(0 <= self.label_smoothing < 1, "augment.label_smoothing", self.label_smoothing, "in [0, 1)")
        require(0 <= self.erase.probability <= 1, "augment.erase.probability", self.erase.probability, "in [0, 1]")
        require(self.fused in ("auto", "verify", "off"), "augment.fused", self.fused, "auto, verify or off")
        require(
            self.erase.mode in ERASE_MODES,
            "augment.erase.mode",
            self.erase.mode,
            f"one of {', '.join(ERASE_MODES)}",
        )
        scale, ratio, mix = self.erase.scale, self.erase.ratio, self.mix
        require(0 < scale[0] <= scale[1] <= 1, "augment.erase.scale", scale, "0 < low <= high <= 1")
        require(0 < ratio[0] <= ratio[1], "augment.erase.ratio", ratio, "0 < low <= high")
        for name in ("mixup_alpha", "cutmix_alpha"):  # the table of Beta's quantiles is exact enough within this range
            alpha = getattr(mix, name)
            require(alpha == 0 or 1e-6 <= alpha <= 10, f"augment.mix.{name}", alpha, "0 (off) or more, at most 10")
        require(0 <= mix.probability <= 1, "augment.mix.probability", mix.probability, "in [0, 1]")
        require(0 <= mix.switch_probability <= 1, "augment.mix.switch_probability", mix.switch_probability, "in [0, 1]")


class LoaderConfig(Protocol):
    """The part of a config that `make_loader` reads."""

    @property
    def seed(self) -> int: ...
    @property
    def data(self) -> DataOptions: ...
    @property
    def augment(self) -> AugmentOptions: ...


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
    """All that a pipeline needs: the validated shard, the plan, this process's part and where batches go."""

    reader: ShardReader
    plan: Plan
    shard: ShardOptions
    device: torch.device
    threads: int
    prefetch_batches: int
    most_prefetched: int
    read_ahead_batches: int
    hw_decoder_load: float
    on_error: Literal["raise", "mask"]

    def resized(self, image_size: int) -> Source:
        """The same for another image size."""
        return replace(self, plan=self.plan.resized(image_size))

    def batch_plan(self, epoch: int, index: int) -> BatchPlan:
        return self.plan.batch(epoch, index).shard(self.shard.rank, self.shard.world_size)

    def batch(self, images: torch.Tensor, plan: BatchPlan, labels: torch.Tensor | None = None) -> Batch:
        """A batch from this process's decoded images (uint8 (B, H, W, 3), any device) and plan.

        `labels` are the ones that the pipeline read itself, where it does; else the reader's.

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

    def set_image_size(self, image_size: int) -> None:
        """Iterators made from now on yield images of this size; the plan's draws stay, its boxes in them follow."""
        ...

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        """The batches `start`, `start + 1`, ... of an epoch. Closing the iterator early leaves nothing running."""
        ...

    def close(self) -> None: ...


def make_plan(
    config: LoaderConfig, sizes: np.ndarray, *, train: bool, world_size: int, seed: int | None = None
) -> Plan:
    """The plan of a training or an evaluation split for images of these sizes (int32 (N, 2): height, width)."""
    data = config.data
    batch_size = data.batch_size_per_gpu * world_size
    seed = config.seed if seed is None else seed
    if not train:
        return Plan(
            seed=seed,
            sizes=sizes,
            batch_size=batch_size,
            image_size=data.image_size,
            order="sequential",
            centre_fraction=data.centre_fraction,
        )
    if config.augment.mix.enabled and data.batch_size_per_gpu % 2:
        raise UserError(
            f"data.batch_size_per_gpu = {data.batch_size_per_gpu}: MixUp and CutMix mix pairs: must be even"
        )
    if len(sizes) < batch_size:
        raise UserError(
            f"the training split has {len(sizes)} samples, fewer than one batch "
            f"(data.batch_size_per_gpu {data.batch_size_per_gpu} x {world_size} processes); lower the batch size"
        )
    return Plan(
        seed=seed,
        sizes=sizes,
        batch_size=batch_size,
        image_size=data.image_size,
        order=data.order,
        crop=data.crop,
        randaugment=config.augment.randaugment,
        erase=config.augment.erase,
        mix=config.augment.mix,
    )


def choose_pipeline(device: torch.device, shard_format: str) -> str:
    """What `auto` stands for: native, else dali on a GPU, else ffcv (it reads .beton files only), else torchvision; the
    first that is installed."""
    order = ["native", "dali"] if device.type == "cuda" else ["native"]
    order += ["ffcv"] if shard_format == "beton" else []
    return next((name for name in order if _installed(name)), "torchvision")


def _installed(name: str) -> bool:
    if name == "native":
        return native_decoder.available()
    try:
        return importlib.util.find_spec(PIPELINES[name][1]) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name is absent
        return False


def make_loader(
    config: LoaderConfig,
    split: Literal["train", "val"],
    shard: ShardOptions,
    device: torch.device,
) -> Loader:
    """Opens the shard set of `config.data` and returns the loader of its training or evaluation split.

    Raises:
        ShardError: what is on disk is not a valid shard set.
        BackendMissingError: the pipeline's library cannot be imported; the message has the cause, the command that
            mends it, and the pipelines that would work. An explicit choice never falls back.
        UserError: the batch size does not fit the split; another pipeline than `native` is to mask.
    """
    data = config.data
    if data.pipeline not in ("auto", *PIPELINES):
        raise UserError(f"data.pipeline = {data.pipeline!r}: must be one of auto, {', '.join(PIPELINES)}")
    if not data.path:
        raise UserError("no shard set given: pass --data SHARDS (made by preprocess/build_ffcv.py)")
    name = data.train_split if split == "train" else data.val_split
    manifest, reader = open_split(data.path, name)
    if reader.num_samples == 0:
        raise UserError(f"{reader.path}: the split has no samples")
    plan = make_plan(config, reader.sizes, train=split == "train", world_size=shard.world_size)
    auto = data.pipeline == "auto"
    pipeline = choose_pipeline(device, manifest.splits[name].format) if auto else data.pipeline
    if data.on_error == "mask" and pipeline != "native":
        raise UserError(f"data.on_error = 'mask': pipeline {pipeline!r} cannot mask, only --pipeline native can")
    source = Source(
        reader,
        plan,
        shard,
        device,
        data.threads(shard.local_world_size),
        *data.prefetch,
        data.read_ahead_batches,
        data.hw_decoder_load,
        data.on_error,
    )
    return _backend(pipeline)(source, manifest)


def _backend(name: str) -> Any:
    module, _, remedy = PIPELINES[name]
    try:
        if name == "native":
            native_decoder.load()
        return importlib.import_module(module).make
    except (ImportError, OSError) as error:  # OSError: a shared library that the package needs is missing
        working = [other for other in PIPELINES if other != name and _installed(other)]
        cause = " ".join(str(error).split())
        raise BackendMissingError(
            f"pipeline {name!r} cannot be used here: {cause}; to mend it: {remedy()}; "
            f"these would work: {', '.join(working)}"
        ) from error


def why_missing(name: str) -> str | None:
    """None when a pipeline can be used here; else the line that says why not and what to do. Imports its library."""
    try:
        _backend(name)
    except BackendMissingError as error:
        return str(error)
    return None
