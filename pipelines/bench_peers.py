"""Other projects' loaders for the benchmark, set up as their users do, with random resized crops of their own.

No plan reaches into them, so they deliver other samples and boxes, drawn from the same distribution, and their rows say
so. All give uint8 batches; Pillow decodes whole frames in `DataLoader` workers, or in the process itself on one core.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Generator, Iterable
from io import BytesIO
from typing import Any, Final

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipelines.bench_worker import Job
from pipelines.errors import BackendMissingError, UserError
from pipelines.layout import ShardReader, open_split

__all__ = ["PEERS", "PeerStream", "open_peer"]


class PeerStream:
    """See `pipelines.bench_worker.Stream`; `loader` yields (images, labels)."""

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
                if hasattr(iterator, "_shutdown_workers"):  # at once, not when collected
                    iterator._shutdown_workers()


def _workers(job: Job) -> int:
    return len(job.cores) if len(job.cores) > 1 else 0


def _webdataset(job: Job) -> PeerStream:
    import webdataset
    from torchvision.transforms import v2

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
    """The samples of a split as Pillow images; `transform` is set by timm.

    A small split is repeated: an end, where timm waits for its last batch and starts new workers, shall be rare.
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

    loader = create_loader(
        _Images(open_split(job.data, job.split)[1]),  # what timm wants of a dataset is `transform`
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
    return PeerStream(loader.loader)  # without the prefetcher around it, which normalises


# name -> (the function that opens it, what must be importable)
PEERS: Final[dict[str, tuple[Callable[[Job], PeerStream], str]]] = {
    "webdataset": (_webdataset, "webdataset"),
    "timm": (_timm, "timm"),
}


def open_peer(name: str) -> Callable[[Job], PeerStream]:
    open_it, package = PEERS[name]
    if importlib.util.find_spec(package) is None:
        raise BackendMissingError(f"{package} is not installed: pip install {package}")
    importlib.import_module(package)  # before the clock of the first batch starts

    def opened(job: Job) -> PeerStream:
        if job.mode != "train":
            raise UserError(f"{name} is measured with --mode train only")
        if job.device != "cpu":
            raise UserError(f"{name} is measured with --device cpu only")
        return open_it(job)

    return opened
