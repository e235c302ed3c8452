"""Writes the images of a part one after the other, such that a killed run can be continued."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sdpnet.pipelines.files.atomic_write import write_all
from sdpnet.pipelines.shards.manifest import ShardFile
from sdpnet.preprocess.conversion.writers.records import Records, require_bytes

__all__ = ["SpoolWriter"]


class SpoolWriter:
    """Writes one split of a part as `SPLIT.spool`.

    It is used like `sdpnet.preprocess.conversion.writers.beton.BetonWriter`. The position of an image is the sum of the
    sizes of the images before it. A part has no shard files, so `finish` returns none.
    """

    format = "part"

    def __init__(self, directory: Path, split: str, num_images: int) -> None:
        self.path = directory / f"{split}.spool"
        self._end = 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def resume(self, sizes: Iterable[int]) -> None:
        self._end = sum(sizes)
        require_bytes(self._file, self._end, self.path)
        os.ftruncate(self._file, self._end)

    def add(self, image: bytes | memoryview, label: int) -> None:
        write_all(self._file, image, self._end)
        self._end += len(image)

    def sync(self) -> None:
        os.fsync(self._file)

    def finish(self, records: Records) -> tuple[ShardFile, ...]:
        return ()
