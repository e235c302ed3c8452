"""The contestants of `pipelines/benchmarks/augment.py`: our device stage, and its equivalents with other libraries.

    uint8 (B, 3, H, W), labels --> images (B, 3, H, W), channels_last, and targets (B, num_classes), both float

A contestant is a function that makes a given number of such batches.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import EraseOptions, MixOptions, Plan
from sdpnet.pipelines.planning.policies import Operation, RandAugmentOptions

__all__ = [
    "CLASSES",
    "ROUND",
    "SEED",
    "Contestant",
    "PerSample",
    "has_kornia",
    "in_processes",
    "in_threads",
    "kornia_stage",
    "make_images",
    "ours",
    "policies",
    "race",
]

Contestant = Callable[[int], object]


CLASSES: Final = 1000
ROUND: Final = 4  # the number of different batches of draws, and of the batches that a contestant makes in a round
SEED: Final = AugmentOptions(
    randaugment=RandAugmentOptions("randaugment", num_ops=2, magnitude=9),
    erase=EraseOptions(0.25),
    mix=MixOptions(0.8, 1.0),
)
_NEEDS_STATISTICS: Final = (Operation.CONTRAST, Operation.SHARPNESS, Operation.AUTOCONTRAST, Operation.EQUALIZE)


def make_images(batch: int, size: int) -> torch.Tensor:
    """Random images, uint8 (B, size, size, 3): smooth fields with noise, whose levels spread as in photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").mul_(180).add_(30)
    smooth += torch.randn(batch, 3, size, size, generator=generator) * 8
    return smooth.clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def ours(options: AugmentOptions, images: torch.Tensor, dtype: torch.dtype, *, pointwise: bool = False) -> Contestant:
    """Our device stage. Each batch uses the next of `ROUND` batches of draws.

    `pointwise` removes the operations that need statistics or neighbours.
    """
    batch, size = images.shape[:2]
    draws = Plan(
        seed=0,
        sizes=np.full((batch * ROUND, 2), size, np.int32),
        batch_size=batch,
        image_size=size,
        randaugment=options.randaugment,
        erase=options.erase,
        mix=options.mix,
    )
    plans = [draws.batch(0, index) for index in range(ROUND)]
    if pointwise:
        plans = [replace(plan, ops=np.where(np.isin(plan.ops, _NEEDS_STATISTICS), 0, plan.ops)) for plan in plans]
    labels = (torch.arange(batch) % CLASSES).to(images.device)
    valid = torch.ones(batch, dtype=torch.bool, device=images.device)
    stage = DeviceStage(options, CLASSES, dtype, train=True)
    batches = [Batch(images, labels, torch.from_numpy(plan.sample_ids), valid, plan) for plan in plans]

    def run(count: int) -> None:
        for number in range(count):
            stage(batches[number % ROUND])

    return run


def policies(images: torch.Tensor, dtype: torch.dtype, fused_mode: str) -> dict[str, Contestant]:
    """Our device stage with each of its policies."""
    increasing, three = RandAugmentOptions("increasing", fill=(124.0, 116.0, 104.0)), RandAugmentOptions("three")
    options = {
        "sdpnet": SEED,
        "sdpnet, increasing": replace(SEED, randaugment=increasing),
        "sdpnet, three": replace(SEED, randaugment=three),
    }
    return {name: ours(replace(o, fused=fused_mode), images, dtype) for name, o in options.items()}  # type: ignore[arg-type]


class PerSample:
    """torchvision.transforms.v2, applied sample by sample, then MixUp or CutMix of the batch.

    Args:
        options: the augmentation. The policy must be "randaugment", and erasing must use the mean colour.
        images: uint8 (B, 3, H, W), on any device.
        labels: int64 (B,).
        num_classes: the width of the targets.
    """

    def __init__(self, options: AugmentOptions, images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
        self.images, self.labels = images, labels
        self.transform = v2.Compose(
            [
                v2.RandAugment(options.randaugment.num_ops, int(options.randaugment.magnitude)),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(options.mean), list(options.std)),
                v2.RandomErasing(options.erase.probability),
            ]
        )
        mixup = v2.MixUp(alpha=options.mix.mixup_alpha, num_classes=num_classes)
        cutmix = v2.CutMix(alpha=options.mix.cutmix_alpha, num_classes=num_classes)
        self.mix = v2.RandomChoice([mixup, cutmix])

    def __call__(self, count: int) -> None:
        for _ in range(count):
            self.mixed(torch.stack([self.transform(image) for image in self.images]), self.labels)

    def mixed(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixes a batch. Returns images in channels_last and targets."""
        images, targets = self.mix(images, labels)
        return images.contiguous(memory_format=torch.channels_last), targets


@contextmanager
def in_threads(peer: PerSample, threads: int) -> Iterator[Contestant]:
    """`peer` with its samples spread over a pool of threads, each of which uses one torch thread."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def run(count: int) -> None:
            for _ in range(count):
                samples = list(pool.map(peer.transform, peer.images))
                torch.set_num_threads(threads)  # the pool's threads have set it for all threads
                peer.mixed(torch.stack(samples), peer.labels)

        yield run


class _Samples(Dataset[Any]):
    """A data set that repeats the samples of one batch."""

    def __init__(self, peer: PerSample, length: int) -> None:
        self.peer, self.length = peer, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        at = index % len(self.peer.images)
        return self.peer.transform(self.peer.images[at]), int(self.peer.labels[at])


def in_processes(peer: PerSample, processes: int, count: int) -> Contestant:
    """`peer` with its samples transformed by a `DataLoader`'s worker processes; this process mixes the batches.

    Each call makes `count` batches. The processes end when the returned function is collected.
    """
    size = len(peer.images)
    loader = DataLoader(_Samples(peer, size * count), size, num_workers=processes, persistent_workers=True)

    def run(number: int) -> None:
        assert number == count
        for images, labels in loader:
            peer.mixed(images, labels)

    return run


def has_kornia() -> bool:
    return importlib.util.find_spec("kornia") is not None


def kornia_stage(options: AugmentOptions, images: torch.Tensor, labels: torch.Tensor) -> Contestant:
    """kornia's augmentations, applied to the whole batch at once in float32. Its targets are pairs of labels."""
    import kornia.augmentation as ka

    stage = ka.AugmentationSequential(
        ka.auto.RandAugment(options.randaugment.num_ops, int(options.randaugment.magnitude)),
        ka.Normalize(list(options.mean), list(options.std)),
        ka.RandomErasing(p=options.erase.probability),
    )
    keys = ["input", "class"]
    mixes = [
        ka.RandomMixUpV2(p=1.0, data_keys=keys),
        ka.RandomCutMixV2(p=1.0, data_keys=keys),
    ]  # used in turn, because a sequence may contain only one of them

    def run(count: int) -> None:
        for number in range(count):
            mixed = mixes[number % 2](stage(images.float().div_(255)), labels)
            mixed[0].contiguous(memory_format=torch.channels_last)

    return run


def race(contestants: dict[str, Contestant], rounds: int, count: int, device: torch.device) -> dict[str, list[float]]:
    """The seconds per batch of each contestant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in contestants if number % 2 else reversed(contestants):
            began = time.perf_counter()
            contestants[name](count)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append((time.perf_counter() - began) / count)
    return seconds
