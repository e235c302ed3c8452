"""What lies on disk: the manifest of a shard set, and the one door to its samples.

SHARDS/manifest.json        schema version, source, classes, encode settings; per split its files and checksums; its own
SHARDS/quarantine.jsonl     the images that could not be converted, and why; only when there are any
format "beton" (`beton_reader`), read by FFCV too:
SHARDS/train.beton          images and labels
SHARDS/train.crc32          the CRC-32 of each sample's encoded image (uint32)
format "tar" (`tar_reader`), read by DALI's `readers.webdataset` and the `webdataset` library too:
SHARDS/train-000000.tar     sample 12 is 000000012.jpg and 000000012.cls (its label in digits)
SHARDS/train-000000.idx     DALI's index of it
SHARDS/train-000000.samples where each image lies, its size, label and CRC-32
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.beton import BetonReader
from sdpnet.pipelines.shards.file import open_regular
from sdpnet.pipelines.shards.manifest import (
    Manifest,
    ShardFile,
    read_manifest,
)
from sdpnet.pipelines.shards.tar import TarReader

__all__ = ["ShardReader", "open_file", "open_split", "sha256_of"]


class ShardReader(Protocol):
    """Random access to the samples of one split; safe to share between threads, cheap to send to a process.

    Attributes:
        path: what an error calls the split.
        num_samples: at least 0.
        labels: int64 (num_samples,).
        sizes: int32 (num_samples, 2): height, width in pixels.
        modes: uint8 (num_samples,): `beton_reader.MODE_JPEG` or `MODE_RAW`.
        nbytes: int64 (num_samples,): bytes of each encoded image.
    """

    path: Path
    num_samples: int
    labels: np.ndarray
    sizes: np.ndarray
    modes: np.ndarray
    nbytes: np.ndarray

    def encoded(self, sample_id: int) -> np.ndarray:
        """The bytes of one sample's image as read-only uint8 (n,): a JPEG file, or raw (height, width, 3) pixels."""
        ...

    def addresses(self, sample_ids: np.ndarray) -> np.ndarray:
        """Where the bytes of these samples' images lie in memory while the reader lives: uint64 (n,)."""
        ...

    def check(self, sample_ids: np.ndarray) -> None:
        """Raises `ShardError` if a file that these samples are in was changed since the reader opened it."""
        ...


def open_split(directory: str | os.PathLike[str], split: str) -> tuple[Manifest, ShardReader]:
    """Opens one split of a shard set for random access: (manifest, reader).

    Raises `ShardError` for what `read_manifest` and the format's validator refuse, for a split that is not there, for a
    file that is absent or of another size than the manifest says, and for labels outside the manifest's classes.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        there = ", ".join(sorted(manifest.splits)) or "none"
        remedy = "; to make one, convert again with --val FOLDER or --val-share 0.05" if split == "val" else ""
        raise ShardError(
            f"{directory}: no split {split!r}; it has {there} (see data.train_split and data.val_split){remedy}"
        )
    found = manifest.splits[split]
    if found.format == "tar":
        paths = [_path(directory, file) for file in found.files]
        sizes = [file.bytes for file in found.files]
        reader: ShardReader = TarReader(paths, directory / f"{split}-*.tar", sizes)
        return manifest, _checked(reader, found.num_samples, manifest)
    return manifest, open_file(directory, manifest, found.files[0])


def open_file(directory: str | os.PathLike[str], manifest: Manifest, file: ShardFile) -> ShardReader:
    """Opens one file of a shard set for random access; raises as `open_split` does."""
    directory = Path(directory)
    path = _path(directory, file)
    beton = file.name.endswith(".beton")
    reader: ShardReader = BetonReader(path, file.bytes) if beton else TarReader([path], path, [file.bytes])
    return _checked(reader, file.num_samples, manifest)


def _path(directory: Path, file: ShardFile) -> Path:
    path = directory / file.name
    if not os.path.exists(path):
        raise ShardError(f"{path}: the manifest names it, but it is not there; copy it here or convert again")
    return path


def _checked(reader: ShardReader, num_samples: int, manifest: Manifest) -> ShardReader:
    if reader.num_samples != num_samples:
        raise ShardError(
            f"{reader.path}: {reader.num_samples} samples, but the manifest says {num_samples}; convert again"
        )
    if reader.num_samples and not 0 <= reader.labels.min() <= reader.labels.max() < manifest.num_classes:
        bad = int(np.flatnonzero((reader.labels < 0) | (reader.labels >= manifest.num_classes))[0])
        raise ShardError(
            f"{reader.path}: sample {bad}: label {reader.labels[bad]}, but there are {manifest.num_classes} classes"
        )
    return reader


def sha256_of(path: Path, first: int = 0) -> str:
    """SHA-256 of a regular file, hex: of its bytes from `first` on, followed by those before.

    Raises `ShardError` for what is no regular file.
    """
    digest = hashlib.sha256()
    with open(open_regular(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size  # no more, even if it grows meanwhile
        first = min(first, size)
        left = size - first
        file.seek(first)
        while left > 0 and (chunk := file.read(min(left, 1 << 23))):
            digest.update(chunk)
            left -= len(chunk)
        file.seek(0)
        while first > 0 and (chunk := file.read(min(first, 1 << 23))):
            digest.update(chunk)
            first -= len(chunk)
    return digest.hexdigest()
