"""The layout of a shard set on disk, and the functions that open its splits and files.

SHARDS/manifest.json        schema version, source, classes, encoder settings; files and checksums of each split;
                            its own checksum
SHARDS/quarantine.jsonl     the images that could not be converted, and why; only if there are any

format "beton" (`sdpnet.pipelines.shards.beton`), also read by FFCV:
SHARDS/train.beton          images and labels
SHARDS/train.crc32          the CRC-32 of each sample's encoded image (uint32)

format "tar" (`sdpnet.pipelines.shards.tar`), also read by DALI's `readers.webdataset` and the `webdataset` library:
SHARDS/train-000000.tar     sample 12 is 000000012.jpg and 000000012.cls (its label in digits)
SHARDS/train-000000.idx     DALI's index of the tar
SHARDS/train-000000.samples the offset, size, label and CRC-32 of each image

format "index" (`sdpnet.pipelines.shards.in_place`), the images lie elsewhere:
SHARDS/train.index          file, offset, size, label and size in pixels of each image
SHARDS/train.converted      the images that had to be converted, one after the other; only if there are any
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
from sdpnet.pipelines.shards.in_place import InPlaceReader
from sdpnet.pipelines.shards.manifest import (
    Manifest,
    ShardFile,
    read_manifest,
)
from sdpnet.pipelines.shards.places import Places
from sdpnet.pipelines.shards.tar import TarReader

__all__ = ["ShardReader", "open_file", "open_split", "sample_name", "sha256_of"]


class ShardReader(Protocol):
    """Reads the samples of one split in any order. It may be shared between threads and sent to other processes.

    Attributes:
        path: the split's name in errors.
        num_samples: the number of samples, at least 0.
        labels: int64 (num_samples,).
        sizes: int32 (num_samples, 2), height and width in pixels.
        modes: uint8 (num_samples,), `MODE_JPEG` or `MODE_RAW` of `sdpnet.pipelines.shards.beton`.
        nbytes: int64 (num_samples,), the number of bytes of each encoded image.
    """

    path: Path
    num_samples: int
    labels: np.ndarray
    sizes: np.ndarray
    modes: np.ndarray
    nbytes: np.ndarray

    def encoded(self, sample_id: int) -> np.ndarray:
        """The bytes of one sample's image, read-only uint8 (n,): a JPEG file, or raw pixels (height, width, 3)."""
        ...

    def places(self, sample_ids: np.ndarray) -> Places:
        """The places of samples' images, for the native decoder."""
        ...

    def file_of(self, sample_id: int) -> str:
        """The path of the file that holds a sample's image."""
        ...

    def check(self, sample_ids: np.ndarray) -> None:
        """Raises `ShardError` if a file that contains one of these samples was changed since it was opened."""
        ...


def open_split(directory: str | os.PathLike[str], split: str) -> tuple[Manifest, ShardReader]:
    """Opens one split of a shard set. Returns its manifest and a reader.

    Raises `ShardError` if the split or one of its files does not exist, if a file's size differs from the manifest's,
    if a label is outside the manifest's classes, and as `read_manifest` and the format's validator do.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        known = ", ".join(sorted(manifest.splits)) or "none"
        remedy = "; to make one, convert again with --val FOLDER or --val-share 0.05" if split == "val" else ""
        raise ShardError(
            f"{directory}: no split {split!r}; it has {known} (see data.train_split and data.val_split){remedy}"
        )
    found = manifest.splits[split]
    if found.format == "tar":
        paths = [_path(directory, file) for file in found.files]
        sizes = [file.bytes for file in found.files]
        reader: ShardReader = TarReader(paths, directory / f"{split}-*.tar", sizes)
        return manifest, _checked(reader, found.num_samples, manifest)
    return manifest, open_file(directory, manifest, found.files[0])


def open_file(directory: str | os.PathLike[str], manifest: Manifest, file: ShardFile) -> ShardReader:
    """Opens one file of a shard set. Raises `ShardError` as `open_split` does."""
    directory = Path(directory)
    path = _path(directory, file)
    reader: ShardReader
    if file.name.endswith(".beton"):
        reader = BetonReader(path, file.bytes)
    elif file.name.endswith(".index"):
        reader = InPlaceReader(path, file.bytes)
    else:
        reader = TarReader([path], path, [file.bytes])
    return _checked(reader, file.num_samples, manifest)


def _path(directory: Path, file: ShardFile) -> Path:
    """The path of a file of a shard set, which must exist."""
    path = directory / file.name
    if not os.path.exists(path):
        raise ShardError(f"{path}: the manifest names it, but it is not there; copy it here or convert again")
    return path


def _checked(reader: ShardReader, num_samples: int, manifest: Manifest) -> ShardReader:
    """Returns the reader, after comparing its number of samples and its labels with the manifest."""
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


def sample_name(reader: ShardReader, sample_id: int) -> str:
    """The name of a sample in errors; of an image in place also the file."""
    name = f"{reader.path}: sample {sample_id}"
    return f"{name}, {reader.file_of(sample_id)}" if isinstance(reader, InPlaceReader) else name


def sha256_of(path: Path, first: int = 0) -> str:
    """The SHA-256, in hex, of a regular file's bytes from `first` on, followed by the bytes before `first`.

    Raises `ShardError` if it is not a regular file.
    """
    digest = hashlib.sha256()
    with open(open_regular(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size  # fixed, even if the file grows meanwhile
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
