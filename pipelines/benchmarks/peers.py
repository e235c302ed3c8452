"""Other projects' loaders for the benchmark, set up as their users do. All of them yield uint8 batches on the CPU.

`webdataset` and `timm` cannot follow a plan. They deliver other samples and boxes, drawn from the same distribution,
and their rows say so. Pillow decodes for them in `DataLoader` workers, or in the process itself if there is one core.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterable, Iterator
from io import BytesIO
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from sdpnet.pipelines.benchmarks.stream import RepeatedPlan, data_options, job_plan
from sdpnet.pipelines.benchmarks.worker import Job, Stream
from sdpnet.pipelines.errors import BackendMissingError, UserError
from sdpnet.pipelines.shards.layout import ShardReader, open_split
from sdpnet.pipelines.terminal.remedy import install

__all__ = ["PEERS", "PeerStream", "SpdlStream", "open_peer"]


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
        raise UserError(f"{job.data}: webdataset reads tars only (made by preprocess/build_dali.py)")
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


# name -> (the function that opens it, the module that must be importable)
PEERS: Final[dict[str, tuple[Callable[[Job], Stream], str]]] = {
    "webdataset": (_webdataset, "webdataset"),
    "timm": (_timm, "timm.data"),
    "spdl": (SpdlStream, "spdl.io"),
}


def open_peer(name: str) -> Callable[[Job], Stream]:
    """Imports a peer and returns the function that opens it. Raises `BackendMissingError`."""
    open_it, module = PEERS[name]
    try:
        importlib.import_module(module)  # before the first batch is timed
    except ModuleNotFoundError:
        raise BackendMissingError(f"{name} is not installed: {install(name)}") from None

    def opened(job: Job) -> Stream:
        if job.device != "cpu":
            raise UserError(f"{name} is measured with --device cpu only")
        return open_it(job)

    return opened
