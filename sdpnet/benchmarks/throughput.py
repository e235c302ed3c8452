"""The rates of the parts of training on this machine, each measured alone.

The parts are reading, decoding, copying to the GPU, augmentation, and the training step of the model.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.model.sdpnet import SdPNet
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.benchmarks.process import BenchProcess
from sdpnet.pipelines.benchmarks.worker import Job, Round
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.loader import make_plan
from sdpnet.pipelines.options import ShardOptions
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.training.step import make_training_step

__all__ = [
    "Reading",
    "augment_rate",
    "copy_rate",
    "decode_round",
    "matmul_rate",
    "noise",
    "reading_rates",
    "step_on_noise",
    "step_rate",
]

DECODE_BATCH = 64
MAX_FILES = 50_000  # the number of files that are dropped from memory and read again


@dataclass(frozen=True)
class Reading:
    """The rate of reading encoded samples in random order, in images and in bytes per second."""

    images_per_second: float
    bytes_per_second: float


def reading_rates(data: str, split: str, threads: int, seconds: float) -> tuple[Reading | None, Reading]:
    """Measures reading from the disk and from memory.

    Returns:
        (from the disk, from memory). The first is None if the system has not dropped the files from memory.
    """
    manifest, reader = open_split(data, split)
    samples = np.random.default_rng(0).permutation(reader.num_samples)
    paths = [str(Path(data) / file.name) for file in manifest.splits[split].files]
    if manifest.splits[split].format == "index":
        samples = samples[:MAX_FILES]  # each may lie in a file of its own
        paths = list(dict.fromkeys(map(reader.file_of, samples.tolist())))
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    def read(samples: np.ndarray) -> tuple[int, int, float]:
        began = time.perf_counter()
        queue = iter(samples.tolist())

        def take() -> list[int]:
            taken = []
            for sample in queue:
                reader.encoded(sample).max()  # numpy releases the lock of the interpreter meanwhile
                taken.append(sample)
                if time.perf_counter() - began > seconds:
                    break
            return taken

        with ThreadPoolExecutor(threads) as pool:
            done = np.concatenate([future.result() for future in [pool.submit(take) for _ in range(threads)]])
        return len(done), int(reader.nbytes[done.astype(np.int64)].sum()), time.perf_counter() - began

    fetched = _fetched_bytes()
    count, size, took = read(samples)
    fetched = _fetched_bytes() - fetched
    cold = Reading(count / took, size / took) if fetched > size / 2 else None
    count, size, took = read(samples[:count])
    return cold, Reading(count / took, size / took)


def _fetched_bytes() -> int:
    """The number of bytes that the system has fetched from storage for this process so far."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def decode_round(
    data: str, split: str, pipeline: str, image_size: int, cores: list[int], device: torch.device, seconds: float
) -> Round:
    """Runs one round of a pipeline on the given cores, with the files in memory. Raises `ContestantError`."""
    num_samples = open_split(data, split)[1].num_samples
    batch_size = min(DECODE_BATCH, num_samples)
    job = Job(pipeline, data, split, "train", image_size, batch_size, tuple(cores), device.type)
    with BenchProcess(job) as process:
        process.start()
        return process.round(process.calibrate(seconds))


def copy_rate(image_size: int, device: torch.device, seconds: float) -> float:
    """Images/s of copies of uint8 images from pinned memory to the GPU."""
    images = torch.empty(256, image_size, image_size, 3, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(images, device=device)
    return _rate(lambda: target.copy_(images, non_blocking=True), len(images), device, seconds)


def augment_rate(stage: DeviceStage, batch: Batch, seconds: float) -> float:
    """Images/s of the device stage, on the batch's device."""
    return _rate(lambda: stage(batch), len(batch.images), batch.images.device, seconds)


def matmul_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """FLOP/s of products of large square matrices in `dtype`, an upper limit for any training step."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 * _rate(lambda: left @ right, 1, device, seconds)


def step_rate(config: Config, batch_size: int, device: torch.device, seconds: float) -> float:
    """Images/s of the training step of `train` with this config, on noise, in one process."""
    step, num_images, _ = step_on_noise(config, batch_size, device)
    return _rate(step, num_images, device, seconds)


def step_on_noise(config: Config, batch_size: int, device: torch.device) -> tuple[Callable[[], object], int, list[str]]:
    """Makes the training step of `train` with this config.

    Returns:
        A function that takes the next step on noise, its number of images, and lines about the step's choices.
    """
    num_classes = config.model.num_classes or 1000
    quiet = replace(config.train, on_nonfinite="skip", max_nonfinite=10**9)  # on noise, a step may well not be finite
    config = replace(config, train=quiet, data=replace(config.data, batch_size_per_gpu=batch_size))
    model = SdPNet(config.model.options(num_classes)).to(device)
    training_step, notes = make_training_step(config, model, num_classes, Processes(ShardOptions(), device))
    training_step.model.train()
    numbers, batches = itertools.count(1), noise(config, num_classes, device)
    images = batch_size * config.train.accumulate
    return lambda: training_step(batches, next(numbers), config.optim.lr), images, notes


def noise(config: Config, num_classes: int, device: torch.device) -> Generator[Batch, None, None]:
    """Yields endless batches with the draws of a plan. Their images are one noise that is on the device already."""
    size, count = config.data.image_size, config.data.batch_size_per_gpu
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (count, size, size, 3), np.uint8)).to(device)
    labels = torch.from_numpy(generator.integers(0, num_classes, count)).to(device)
    sizes = np.full((8 * count, 2), 256, np.int32)
    plan = make_plan(config.data, config.augment, sizes, train=True, world_size=1, seed=config.seed)
    valid = torch.ones(count, dtype=torch.bool, device=device)
    for index in itertools.count():
        draws = plan.batch(0, index % len(plan))
        yield Batch(images, labels, torch.from_numpy(draws.sample_ids).to(device, non_blocking=True), valid, draws)


def _rate(work: Callable[[], object], num_images: int, device: torch.device, seconds: float) -> float:
    """Images/s of `work`, which processes `num_images` images in a call. Two calls before the timing do not count."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        work()
    finish()
    calls, began = 0, time.perf_counter()
    while calls < 1 or time.perf_counter() - began < seconds:
        for _ in range(4 if device.type == "cuda" else 1):
            work()
            calls += 1
        finish()
    return calls * num_images / (time.perf_counter() - began)
