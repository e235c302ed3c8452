"""Writes WebDataset tars with DALI's index such that a killed run can be continued.

The format is described in `sdpnet.pipelines.shards.tar`.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import open_new, write_all
from sdpnet.pipelines.shards.layout import sha256_of
from sdpnet.pipelines.shards.manifest import ShardFile
from sdpnet.pipelines.shards.tar import BLOCK, END_BYTES, SAMPLE_DTYPE, sample_bytes
from sdpnet.preprocess.conversion.writers.records import Records, require_bytes
from sdpnet.preprocess.workers.result import ImageState

__all__ = ["SHARD_BYTES", "TarWriter"]

SHARD_BYTES: Final = 1 << 29
INDEX_VERSION: Final = "v1.2"  # the version of the format of DALI's wds2idx


class TarWriter:
    """Writes one split as `SPLIT-000000.tar`, `SPLIT-000001.tar`, ... The same samples give the same bytes.

    It is used like `sdpnet.preprocess.conversion.writers.beton.BetonWriter`. The position of an image depends only on
    the sizes of the images before it. Memory does not grow with the number of images, except in `finish` with the
    number of images of one tar. The SHA-256 of a tar is computed while it is written.

    Args:
        directory: the folder of the files.
        split: the name of the files.
        num_images: not used by this format.
        shard_bytes: the largest size of a tar with more than one sample; a tar that would exceed it is ended.
    """

    format = "tar"

    def __init__(self, directory: Path, split: str, num_images: int, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = directory
        self.split = split
        self.shard_bytes = shard_bytes
        self._shard, self._end, self._num_samples = 0, 0, 0
        self._file = self._open(0)
        self._digest = hashlib.sha256()  # of the current tar
        self._sha256: dict[int, str] = {}  # of the tars that this run has ended
        self._lock = threading.Lock()  # `sync`, in another thread, must not run during the change to the next tar

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def resume(self, sizes: Iterable[int]) -> None:
        """Keeps the images with these sizes, which an earlier run has written, and removes everything after them.

        Raises `UserError` if a file is missing or too short for them.
        """
        for size in sizes:
            shard, start = self._position(self._shard, self._end, size)
            if shard != self._shard:
                require_bytes(self._file, self._end + END_BYTES, self._path(self._shard))
                self._change_to(shard)
            self._end = start + sample_bytes(size)
            self._num_samples += 1
        require_bytes(self._file, self._end, self._path(self._shard))
        for path in self.directory.glob(f"{self.split}-*.*"):
            if int(path.stem.rpartition("-")[2]) > self._shard:
                path.unlink()
        os.ftruncate(self._file, self._end)
        start = 0
        while chunk := os.pread(self._file, 1 << 23, start):
            self._digest.update(chunk)
            start += len(chunk)

    def add(self, image: bytes | memoryview, label: int) -> None:
        """Appends a sample. Raises `UserError` if the image is larger than a tar member may be."""
        if len(image) >= 1 << 32:
            raise UserError(f"{len(image):,} bytes once encoded; convert with a smaller --max-side or --quality")
        shard, start = self._position(self._shard, self._end, len(image))
        if shard != self._shard:
            with self._lock:
                self._end_tar()
                self._change_to(shard)
        key = f"{self._num_samples:09}"
        digits = str(label).encode()
        sample = b"".join((*_member(f"{key}.jpg", image), *_member(f"{key}.cls", digits)))
        write_all(self._file, sample, start)
        self._digest.update(sample)
        self._end = start + len(sample)
        self._num_samples += 1

    def sync(self) -> None:
        """Waits until everything that was added is on the disk. It may be called from another thread."""
        with self._lock:
            os.fsync(self._file)

    def finish(self, records: Records) -> tuple[ShardFile, ...]:
        """Ends the last tar and writes the files beside each tar. Returns the files for the manifest.

        Tars that an earlier run has ended are read once for their SHA-256.

        Args:
            records: the records of all images of the split, in order. Bad images have no sample.
        """
        self._end_tar()
        files = []
        first = 0
        for shard, samples in enumerate(self._tables(records)):
            tar = self._path(shard)
            sidecars = {}
            for suffix, content in ((".idx", _index(samples, first)), (".samples", samples.tobytes())):
                path = tar.with_suffix(suffix)
                with open_new(path) as file:
                    write_all(file.fileno(), content, 0)
                    os.fsync(file.fileno())
                sidecars[path.name] = sha256_of(path)
            first += len(samples)
            sha256 = self._sha256.get(shard) or sha256_of(tar)
            files.append(ShardFile(tar.name, len(samples), tar.stat().st_size, sha256, sidecars))
        return tuple(files)

    def _tables(self, records: Records) -> Iterator[np.ndarray]:
        """Yields the samples of each tar: `SAMPLE_DTYPE` (n,)."""
        shard, end = 0, 0
        samples: list[tuple[int, ...]] = []
        for piece in records.pieces():
            for size, crc32, label, height, width, state in piece.tolist():
                if state == ImageState.BAD:
                    continue
                next_shard, start = self._position(shard, end, size)
                if next_shard != shard:
                    yield np.array(samples, SAMPLE_DTYPE)
                    shard, samples = next_shard, []
                samples.append((start + BLOCK, size, height, width, label, crc32))
                end = start + sample_bytes(size)
        yield np.array(samples, SAMPLE_DTYPE)

    def _position(self, shard: int, end: int, size: int) -> tuple[int, int]:
        """The tar and the position in it of an image after one that ends at `end` of `shard`."""
        fits = end + sample_bytes(size) + END_BYTES <= self.shard_bytes
        return (shard, end) if fits or not end else (shard + 1, 0)

    def _path(self, shard: int) -> Path:
        return self.directory / f"{self.split}-{shard:06}.tar"

    def _open(self, shard: int) -> int:
        return os.open(self._path(shard), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _change_to(self, shard: int) -> None:
        """Changes to another tar. `_file` is open at any time, because Ctrl-C may come here and cause a `sync`."""
        old = self._file
        self._file, self._shard = self._open(shard), shard
        os.close(old)

    def _end_tar(self) -> None:
        write_all(self._file, bytes(END_BYTES), self._end)
        self._digest.update(bytes(END_BYTES))
        self._sha256[self._shard], self._digest = self._digest.hexdigest(), hashlib.sha256()
        os.fsync(self._file)


def _member(name: str, content: bytes | memoryview) -> tuple[bytes, bytes | memoryview, bytes]:
    """A ustar member without owner and time, so that the bytes are reproducible: header, content, padding."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % BLOCK)


def _index(samples: np.ndarray, first: int) -> bytes:
    """DALI's index of a tar. `first` is the number of its first sample in the split."""
    lines = [f"{INDEX_VERSION} {len(samples)}\n"]
    for key, (offset, size, label) in enumerate(samples[["offset", "size", "label"]].tolist(), first):
        cls = offset + sample_bytes(size) - BLOCK * 2
        lines.append(f"jpg {offset} {size} {key:09}.jpg cls {cls} {len(str(label))} {key:09}.cls\n")
    return "".join(lines).encode()
