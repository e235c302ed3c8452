"""The `torchvision` pipeline, the reference: whole images are decoded, and torchvision crops and resizes them.

It works sample by sample in `DataLoader` workers. It is slow and obvious on purpose: the tests compare the other
pipelines with it. The decoder is `sdpnet.pipelines.images.strict_jpeg`.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

from sdpnet.pipelines.contract import Batch, Source
from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.executors.planned import PlannedLoader
from sdpnet.pipelines.images.strict_jpeg import DamagedJpegError, decode_jpeg
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.plan import BatchPlan
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.layout import ShardReader, sample_name
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["TorchvisionLoader", "decode", "make"]


def decode(reader: ShardReader, sample_id: int) -> torch.Tensor:
    """Decodes one whole stored image: uint8 (3, height, width).

    Raises `ShardError` for a damaged image; the message has the sample's number.
    """
    encoded = reader.encoded(sample_id)
    height, width = (int(side) for side in reader.sizes[sample_id])
    if reader.modes[sample_id] == MODE_RAW:
        return torch.from_numpy(encoded.reshape(height, width, 3).copy()).permute(2, 0, 1)
    try:
        return torch.from_numpy(decode_jpeg(encoded, height, width)).permute(2, 0, 1)
    except DamagedJpegError as error:
        raise ShardError(f"{sample_name(reader, sample_id)}: damaged JPEG ({error})") from None


@dataclass
class _Batches(Dataset["torch.Tensor | ShardError"]):
    """A data set whose item k is batch `start + k` of an epoch, decoded: uint8 (B, size, size, 3).

    An item is the error itself if the batch cannot be decoded.
    """

    source: Source
    epoch: int
    start: int

    def __len__(self) -> int:
        return len(self.source.plan) - self.start

    def __getitem__(self, item: int) -> torch.Tensor | ShardError:
        plan = self.source.batch_plan(self.epoch, self.start + item)
        try:
            try:
                return execute(self.source.reader, plan, self.source.plan.image_size)
            finally:
                # A changed file may have caused another error, or given wrong pixels without any error.
                self.source.reader.check(plan.sample_ids)
        except ShardError as error:
            # Returned, not raised: an error raised in a worker arrives as the text of a traceback.
            return error


def execute(reader: ShardReader, plan: BatchPlan, image_size: int) -> torch.Tensor:
    """Decodes, crops, resizes (antialiased bilinear) and flips a plan's samples: uint8 (B, size, size, 3)."""
    images = torch.empty(len(plan), image_size, image_size, 3, dtype=torch.uint8)
    for i, sample_id in enumerate(plan.sample_ids):
        top, left, height, width = (int(v) for v in plan.crop_boxes[i])
        image = resized_crop(
            decode(reader, int(sample_id)),
            top,
            left,
            height,
            width,
            [image_size, image_size],
            interpolation=InterpolationMode.BILINEAR,
            antialias=True,
        )
        images[i] = (horizontal_flip(image) if plan.flips[i] else image).permute(1, 2, 0)
    return images


def _start_worker(worker_id: int) -> None:
    # The training loop handles these signals, and it still needs batches then. A terminal or a scheduler sends them to
    # all processes of a group at once.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if native_decoder.available():
        native_decoder.guard_again()  # PyTorch's own signal handler would end the worker when a shard is cut


class TorchvisionLoader(PlannedLoader):
    """The loader of the `torchvision` pipeline; see `sdpnet.pipelines.contract.Loader`.

    With one thread, images are decoded in the calling process.
    """

    masked: tuple[int, ...] = ()

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self.source = source
        self.manifest = manifest

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        source = self.source
        workers = 0 if source.threads == 1 else min(source.threads, len(self) - start)
        loader = DataLoader(
            _Batches(source, epoch, start),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=source.prefetch_batches if workers else None,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=source.device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed, which must not come from training's generator
        )
        # A forked worker must not collect objects that threads of this process use: the destructor of a DALI pipeline
        # waits for threads that do not exist in the worker, which hung (records/LOG.md).
        gc.freeze()
        try:
            iterator = iter(loader)
        finally:
            gc.unfreeze()
        try:
            for index, images in enumerate(iterator, start):
                if isinstance(images, ShardError):
                    raise images
                yield source.batch(images, source.batch_plan(epoch, index))
        finally:
            if workers:
                iterator._shutdown_workers()  # type: ignore[attr-defined]  # now, not when collected

    def close(self) -> None:
        """Does nothing: an iterator ends its workers when it ends."""


def make(source: Source, manifest: Manifest) -> TorchvisionLoader:
    return TorchvisionLoader(source, manifest)
