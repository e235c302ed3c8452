"""Writes the index of a split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sdpnet.pipelines.files.atomic_write import errors_name, open_new, write_all
from sdpnet.pipelines.shards.beton import CRC32_DTYPE
from sdpnet.pipelines.shards.index_file import HEADER_DTYPE, INDEX_VERSION, MAGIC, WITH_CHECKSUMS
from sdpnet.pipelines.shards.manifest import ShardFile

__all__ = ["write_index"]

_PIECE = 1 << 24  # bytes


def write_index(
    path: Path,
    folders: np.ndarray,
    containers: np.ndarray,
    names: bytes,
    samples: np.ndarray,
    checksums: np.ndarray | None,
) -> ShardFile:
    """Writes an index file and waits until it is on the disk. Returns its entry for the manifest.

    Args:
        path: the file; it is replaced if it exists.
        folders: `FOLDER_DTYPE` (num_folders,).
        containers: `CONTAINER_DTYPE` (num_containers,).
        names: the paths of the folders and the names of the containers.
        samples: `SAMPLE_DTYPE` (num_samples,).
        checksums: the CRC-32 of each image, uint32 (num_samples,), or None.
    """
    header = np.zeros(1, HEADER_DTYPE)
    header["magic"], header["version"] = MAGIC, INDEX_VERSION
    header["flags"] = 0 if checksums is None else WITH_CHECKSUMS
    header["num_samples"], header["num_containers"] = len(samples), len(containers)
    header["num_folders"], header["names_size"] = len(folders), len(names)
    parts = [header, folders, containers, samples]
    if checksums is not None:
        parts.append(checksums.astype(CRC32_DTYPE))
    digest, size = hashlib.sha256(), 0
    with errors_name(path), open_new(path) as file:
        for piece in _pieces([*(part.data.cast("B") for part in parts if len(part)), memoryview(names)]):
            digest.update(piece)
            write_all(file.fileno(), piece, size)
            size += len(piece)
        os.fsync(file.fileno())
    return ShardFile(path.name, len(samples), size, digest.hexdigest())


def _pieces(parts: Iterable[memoryview]) -> Iterable[memoryview]:
    return (part[start : start + _PIECE] for part in parts for start in range(0, len(part), _PIECE))
