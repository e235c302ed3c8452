"""Other projects' loaders for the benchmark, set up as their users do. All of them yield uint8 batches.

`spdl`, `ffcv_raw` and `torchvision_gpu` follow the plan. `ffcv_raw` is FFCV on a file of which half of the images are
raw pixels, as in FFCV's own ImageNet recipe. `torchvision_gpu` decodes on the GPU; all others deliver on the CPU.
`webdataset` and `timm` cannot follow a plan. They deliver other samples and boxes, drawn from the same distribution,
and their rows say so. Pillow decodes for them in `DataLoader` workers, or in the process itself if there is one core.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sdpnet.pipelines.benchmarks.stream import PipelineStream, RepeatedPlan, data_options, job_plan
from sdpnet.pipelines.benchmarks.worker import Job, Stream
from sdpnet.pipelines.errors import BackendMissingError, UserError
from sdpnet.pipelines.plan import BatchPlan
from sdpnet.pipelines.shards.layout import ShardReader, open_split
from sdpnet.pipelines.terminal.next_step import python
from sdpnet.pipelines.terminal.remedy import install, install_extra

__all__ = ["PEERS", "PeerStream", "SpdlStream", "TorchvisionGpuStream", "open_peer"]


class PeerStream:
    """See `sdpnet.pipelines.benchmarks.worker.Stream`; `loader` yields (images, labels)."""

    crops = "own"

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def batches(self, count: int) -> Generator[tuple[int, None], None, None]:
        while True:
            iterator = iter(self._loader)
            try:
                for images, _ in iterator:
                    yield len(images), None
            finally:
                if hasattr(iterator, "_shutdown_workers"):  # now, not when collected
                    iterator._shutdown_workers()


def _workers(job: Job) -> int:
    return len(job.cores) if len(job.cores) > 1 else 0


def _train_only(job: Job) -> None:
    if job.mode != "train":
        raise UserError(f"{job.contestant} is measured with --mode train only")


def _webdataset(job: Job) -> PeerStream:
    import webdataset
    from torchvision.transforms import v2

    _train_only(job)
    manifest, _ = open_split(job.data, job.split)
    split = manifest.splits[job.split]
    if split.format != "tar":
        raise UserError(f"{job.data}: webdataset reads tars only (made by sdpnet convert --format tar)")
    transform = v2.Compose([v2.RandomResizedCrop(job.image_size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    dataset = (
        webdataset.WebDataset([f"{job.data}/{file.name}" for file in split.files], resampled=True, seed=job.seed)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(job.batch_size, partial=False)
    )
    return PeerStream(DataLoader(dataset, batch_size=None, num_workers=_workers(job)))


class _Images(Dataset[tuple[Any, int]]):
    """The samples of a split as Pillow images. timm sets `transform`.

    A small split is repeated, because timm waits at the end of an epoch for its last batch and starts new workers.
    """

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._length = max(reader.num_samples, 1 << 18)
        self.transform: Any = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> tuple[Any, int]:
        sample = item % self._reader.num_samples
        image = Image.open(BytesIO(self._reader.encoded(sample).tobytes())).convert("RGB")
        return self.transform(image), int(self._reader.labels[sample])


def _timm(job: Job) -> PeerStream:
    from timm.data import create_loader

    _train_only(job)
    loader = create_loader(
        _Images(open_split(job.data, job.split)[1]),  # timm sets its `transform`
        input_size=(3, job.image_size, job.image_size),
        batch_size=job.batch_size,
        is_training=True,
        use_prefetcher=True,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=_workers(job),
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    return PeerStream(loader.loader)  # without timm's prefetcher around it, which normalises


class SpdlStream:
    """SPDL, which decodes with FFmpeg. It takes a filter for each image, so that it follows the plan."""

    crops = "plan"

    def __init__(self, job: Job) -> None:
        from spdl import io

        _, self._reader = open_split(job.data, job.split)
        io.demux_image(self._reader.encoded(0).tobytes())  # fails here if FFmpeg is missing; the pipeline hides that
        self._plan = job_plan(job, self._reader.sizes)
        self._threads, self._ahead = len(job.cores), data_options(job).prefetch[0]

    def batches(self, count: int) -> Generator[tuple[int, np.ndarray], None, None]:
        from spdl import io
        from spdl.pipeline import PipelineBuilder

        plan = RepeatedPlan(self._plan, count + self._ahead + 3)
        side = plan.image_size

        def samples() -> Iterator[tuple[int, list[int], bool]]:
            for index in range(len(plan)):
                batch = plan.batch(0, index)
                yield from zip(batch.sample_ids.tolist(), batch.crop_boxes.tolist(), batch.flips.tolist(), strict=True)

        def decode(task: tuple[int, list[int], bool]) -> tuple[int, Any]:
            sample, (top, left, height, width), flip = task
            resize = f"crop={width}:{height}:{left}:{top}:exact=1,scale={side}:{side}:flags=bilinear"
            filters = f"{resize}{',hflip' if flip else ''},format=pix_fmts=rgb24"
            packets = io.demux_image(self._reader.encoded(sample).tobytes())
            return sample, io.decode_packets(packets, filter_desc=filters)

        def stack(decoded: list[tuple[int, Any]]) -> tuple[np.ndarray, np.ndarray]:
            pixels = io.to_numpy(io.convert_frames([frame for _, frame in decoded]))
            return np.array([sample for sample, _ in decoded]), pixels

        builder = PipelineBuilder().add_source(samples())
        builder = builder.pipe(decode, concurrency=self._threads, output_order="input").aggregate(plan.batch_size)
        pipeline = builder.pipe(stack).add_sink(self._ahead).build(num_threads=self._threads, max_failures=0)
        with pipeline.auto_stop():
            for ids, images in pipeline.get_iterator():
                yield len(images), ids


class TorchvisionGpuStream:
    """torchvision's `decode_jpeg` on the GPU (nvJPEG), which decodes whole images. It follows the plan.

    A thread reads the encoded images ahead. Crops, resizing and flips are torchvision's, image by image.
    """

    crops = "plan"

    def __init__(self, job: Job) -> None:
        _, self._reader = open_split(job.data, job.split)
        self._plan, self._device = job_plan(job, self._reader.sizes), torch.device(job.device)

    def batches(self, count: int) -> Generator[tuple[int, np.ndarray], None, None]:
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms.v2 import functional

        plan = RepeatedPlan(self._plan, count + 3)
        side = plan.image_size

        def read(index: int) -> tuple[BatchPlan, list[torch.Tensor]]:
            batch = plan.batch(0, index)
            return batch, [
                torch.from_numpy(self._reader.encoded(sample).copy()) for sample in batch.sample_ids.tolist()
            ]

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read, 0)
            for index in range(len(plan)):
                batch, encoded = reading.result()
                reading = pool.submit(read, min(index + 1, len(plan) - 1))
                images = []
                decoded = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=self._device)
                for image, box, flip in zip(decoded, batch.crop_boxes.tolist(), batch.flips.tolist(), strict=True):
                    crop = functional.resized_crop(image, *box, [side, side], antialias=True)
                    images.append(functional.horizontal_flip(crop) if flip else crop)
                yield len(torch.stack(images)), batch.sample_ids


def _ffcv_raw(job: Job) -> Stream:
    """The pipeline `ffcv` on the copy that `half_raw` has written."""
    copy = f"{job.data.rstrip('/')}-half-raw"
    if not os.path.isdir(copy):
        command = f"{python()} -m sdpnet.pipelines.benchmarks.half_raw --data {job.data} --split {job.split}"
        raise UserError(f"{copy} is not there; to make it: {command}")
    return PipelineStream(replace(job, contestant="ffcv", data=copy))


class Peer(NamedTuple):
    """A loader of another project.

    Attributes:
        open: opens it.
        module: the module that must be importable.
        devices: the devices on which its batches can be.
        remedy: returns the command that installs it.
    """

    open: Callable[[Job], Stream]
    module: str
    devices: tuple[str, ...]
    remedy: Callable[[], str]


PEERS: Final[dict[str, Peer]] = {
    "webdataset": Peer(_webdataset, "webdataset", ("cpu",), lambda: install("webdataset")),
    "timm": Peer(_timm, "timm.data", ("cpu",), lambda: install("timm")),
    "spdl": Peer(SpdlStream, "spdl.io", ("cpu",), lambda: install("spdl")),
    "ffcv_raw": Peer(_ffcv_raw, "sdpnet.pipelines.executors.ffcv", ("cpu", "cuda"), lambda: install_extra("ffcv")),
    "torchvision_gpu": Peer(TorchvisionGpuStream, "torchvision.io", ("cuda",), lambda: install("torchvision")),
}


def open_peer(name: str) -> Callable[[Job], Stream]:
    """Imports a peer and returns the function that opens it. Raises `BackendMissingError`."""
    peer = PEERS[name]
    try:
        importlib.import_module(peer.module)  # before the first batch is timed
    except ModuleNotFoundError:
        raise BackendMissingError(f"{name} is not installed: {peer.remedy()}") from None

    def opened(job: Job) -> Stream:
        if job.device not in peer.devices:
            raise UserError(f"{name} is measured with --device {peer.devices[0]} only")
        return peer.open(job)

    return opened
