"""The options of the data path: which shards, how they are read, how images are augmented, and which part is whose.

`DataOptions` and `AugmentOptions` are the sections `data` and `augment` of a config. A knob that only one executor has
is nested under that executor (`data.native`, `data.dali`), and any other executor ignores it. All values are checked
when the options are made; a `UserError` names the config key. This module needs neither torch nor an executor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.machine import core_share
from sdpnet.pipelines.planning.options import (
    ERASE_MODES,
    CropOptions,
    EraseOptions,
    MixOptions,
    Order,
    RandAugmentOptions,
    SamplingOptions,
)

__all__ = ["AugmentOptions", "DaliOptions", "DataOptions", "NativeOptions", "Pipeline", "ShardOptions"]

Pipeline = Literal["auto", "native", "torchvision", "ffcv", "dali", "synthetic"]

LARGEST_IMAGE: Final = 4096  # pixels a side
LARGEST_BATCH: Final = 1 << 20
_PREFETCH: Final = (3, 8)  # data.prefetch_batches = auto


@dataclass(frozen=True)
class ShardOptions:
    """Which part of every batch belongs to this process, and how many processes share this machine's cores.

    Attributes:
        rank: This process's number among all, from 0.
        world_size: The number of processes.
        local_world_size: The number of processes on this machine.

    Raises `ValueError` for a rank outside of the world.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of world size {self.world_size}: need 0 <= rank < world_size")


@dataclass(frozen=True)
class NativeOptions:
    """Section `data.native`: knobs of the `native` executor.

    Attributes:
        read_ahead_batches: The number of batches, before the one that is decoded next, for which the system is already
            asked to read the files; 0 is off.
    """

    read_ahead_batches: int = 4

    def __post_init__(self) -> None:
        ahead = self.read_ahead_batches
        require(0 <= ahead <= 4096, "data.native.read_ahead_batches", ahead, "0 (off) or more, at most 4,096")


@dataclass(frozen=True)
class DaliOptions:
    """Section `data.dali`: knobs of the `dali` executor.

    Attributes:
        hw_decoder_load: The largest share of a batch that a GPU's JPEG unit decodes while CUDA decodes the rest. It has
            an effect only on GPUs with such a unit. DALI's documentation recommends to find the best value by trying.
    """

    hw_decoder_load: float = 0.65

    def __post_init__(self) -> None:
        require(0 <= self.hw_decoder_load <= 1, "data.dali.hw_decoder_load", self.hw_decoder_load, "in [0, 1]")


@dataclass(frozen=True)
class DataOptions:
    """Section `data` of a config: where the shards are, and how they are read and decoded.

    Attributes:
        path: The shard set: a directory with a manifest.json, made by `preprocess/`.
        pipeline: The executor that decodes. `auto` is native; where that is not built, dali on a GPU, else ffcv, else
            torchvision. Any other choice is used or refused, never replaced.
        train_split: The split to train on.
        val_split: The split to evaluate on.
        image_size: Pixels a side of the square images that the model gets; a multiple of the model's patch size.
        batch_size_per_gpu: Images in one batch of one process; an even number where images are mixed.
        num_workers: Threads or worker processes that decode for one process; 0 is this machine's cores divided among
            its processes.
        prefetch_batches: The number of batches that every executor decodes ahead of the one that is asked for. `auto`
            is 3; native then raises it up to 8 where the training waits for batches although the decoder has been idle.
        on_error: What an image that cannot be decoded leads to. `raise` ends the run. `mask` replaces it by a black
            image that counts neither for the loss nor for the score; batch norm still sees it. Every executor but
            native refuses `mask` with an error.
        order: The order of an epoch. `random` is a permutation of all samples. `blocks` shuffles blocks of neighbours,
            and samples within windows of them, so that reads from a disk stay local.
        centre_fraction: The share of the shorter side that the central crop of an evaluation keeps; 0.875 is the usual
            224 / 256.
    """

    path: str = ""
    pipeline: Pipeline = "auto"
    train_split: str = "train"
    val_split: str = "val"
    image_size: int = 224
    batch_size_per_gpu: int = 256
    num_workers: int = 0
    prefetch_batches: Literal["auto"] | int = "auto"
    on_error: Literal["raise", "mask"] = "raise"
    order: Order = "random"
    centre_fraction: float = 0.875
    crop: CropOptions = field(default_factory=CropOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    native: NativeOptions = field(default_factory=NativeOptions)
    dali: DaliOptions = field(default_factory=DaliOptions)

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
        require(self.on_error in ("raise", "mask"), "data.on_error", self.on_error, "raise or mask")
        require(self.order != "sequential", "data.order", self.order, "random or blocks (evaluation is sequential)")
        require(0 < self.centre_fraction <= 1, "data.centre_fraction", self.centre_fraction, "in (0, 1]")
        if self.sampling.weights and self.order != "random":
            raise UserError(f"data.order = {self.order!r}: data.sampling.weights draws samples at random; omit one")
        scale, ratio = self.crop.scale, self.crop.ratio
        require(0 < scale[0] <= scale[1] <= 1, "data.crop.scale", scale, "0 < low <= high <= 1")
        require(0 < ratio[0] <= ratio[1], "data.crop.ratio", ratio, "0 < low <= high")
        require(
            0 <= self.crop.flip_probability <= 1, "data.crop.flip_probability", self.crop.flip_probability, "in [0, 1]"
        )

    @property
    def prefetch(self) -> tuple[int, int]:
        """The number of batches decoded ahead: at first, and at most."""
        return _PREFETCH if self.prefetch_batches == "auto" else (self.prefetch_batches, self.prefetch_batches)

    def threads(self, processes: int = 1) -> int:
        """The number of decoding threads or workers of each of `processes` on this machine."""
        return self.num_workers or core_share(processes)


@dataclass(frozen=True)
class AugmentOptions:
    """Section `augment` of a config: what is done to the decoded images on the device, and to their labels.

    Attributes:
        mean: The mean of red, green and blue that is subtracted, of levels in [0, 1]; by default ImageNet's.
        std: The standard deviation that they are divided by.
        label_smoothing: The share of each target that is spread evenly over all classes.
        fused: Whether Triton kernels compute the pixels. `auto` uses them on GPUs of compute capability 7.5 and more
            where Triton can be imported. `verify` does the same and compares the first batch with the PyTorch
            reference. `off` never uses them.
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
