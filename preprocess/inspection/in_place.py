"""Checks a split whose images lie elsewhere: the index, the files that it points to, and what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from zlib_ng import zlib_ng

from sdpnet.pipelines.errors import ShardError, printable
from sdpnet.pipelines.shards.file import MappedFile
from sdpnet.pipelines.shards.in_place import InPlaceReader
from sdpnet.pipelines.shards.index_file import INDEX_AGAIN, Index
from sdpnet.pipelines.shards.layout import open_file, sha256_of
from sdpnet.pipelines.shards.manifest import Manifest, ShardFile
from sdpnet.preprocess.inspection.undecodable import undecodable

__all__ = ["Found", "problems_in_place"]

_LISTED: Final = 20  # the number of files and of images that are named; the others are counted
_BATCH: Final = 4096  # the number of images that are queued at a time

Found = tuple[str, int | None, str]  # file, sample, and the predicate of a sentence about it


def problems_in_place(
    directory: Path, manifest: Manifest, file: ShardFile, *, quick: bool, decode: bool, num_workers: int
) -> Iterator[Found]:
    """Yields every problem of a split in place.

    Args:
        directory: the shard set.
        manifest: its manifest.
        file: the index file of the split.
        quick: compare only sizes and modification times.
        decode: decode every image, also if the index has their checksums.
        num_workers: the number of threads that read and decode.
    """
    path = directory / file.name
    changed = np.zeros(0, bool)
    try:
        index = Index(MappedFile(path, file.bytes))
        changed = np.zeros(len(index.containers), bool)
        if not quick:
            for name, sha256 in ((file.name, file.sha256), *file.sidecars.items()):
                if sha256_of(directory / name) != sha256:
                    yield name, None, "has changed (SHA-256); copy it again"
        yield from _limited(_changed(index, changed), "file", f"are missing or have changed; {INDEX_AGAIN}")
        reader = open_file(directory, manifest, file)
    except ShardError as error:
        text = str(error)
        own = text.startswith(printable(f"{path}: "))
        if own or not changed.any():  # a container of several images that has changed is named already
            yield file.name, None, text.removeprefix(printable(f"{path}: "))
        return
    assert isinstance(reader, InPlaceReader)
    if not quick:
        samples = np.flatnonzero(~changed[index.samples["container"]])
        bad = _contents(reader, index, samples, num_workers, decode=decode)
        named = ((file.name, sample, _with_path(reader, sample, what)) for sample, what in bad)
        yield from _limited(named, "image", "are damaged or have changed")
    try:
        reader.check(np.arange(reader.num_samples))
    except ShardError as error:
        yield file.name, None, str(error)


def _changed(index: Index, changed: np.ndarray) -> Iterator[Found]:
    """Yields the containers that are missing or changed, and marks them in `changed`, bool (num_containers,)."""
    for container, how in index.changed():
        changed[container] = True
        yield index.path(container), None, f"{how}; {INDEX_AGAIN}"


def _limited(problems: Iterable[Found], what: str, predicate: str) -> Iterator[Found]:
    """The first problems, and the number of all others: a set may have millions of files."""
    more, file = 0, ""
    for count, problem in enumerate(problems):
        file = problem[0]
        if count < _LISTED:
            yield problem
        else:
            more += 1
    if more:
        yield file, None, f"and {more:,} more {what}{'s' * (more > 1)} {predicate}"


def _with_path(reader: InPlaceReader, sample: int, what: str) -> str:
    """The problem of an image with the path of its file; errors of reading have it already."""
    path = printable(reader.file_of(sample))
    return what if what.startswith(path) else f"{path} {what}"


def _contents(
    reader: InPlaceReader, index: Index, samples: np.ndarray, num_workers: int, *, decode: bool
) -> Iterator[tuple[int, str]]:
    """Yields the images whose contents differ from the checksums, or that cannot be decoded."""
    checksums = index.checksums
    if checksums is not None:
        expected = checksums

        def differs(sample: int) -> tuple[int, str] | None:
            try:
                same = zlib_ng.crc32(reader.encoded(sample).data) == expected[sample]
            except ShardError as error:
                return sample, str(error)
            return None if same else (sample, "has changed (CRC-32)")

        with ThreadPoolExecutor(num_workers) as pool:
            for start in range(0, len(samples), _BATCH):
                piece = samples[start : start + _BATCH].tolist()
                yield from (found for found in pool.map(differs, piece) if found is not None)
    if decode or checksums is None:
        yield from undecodable(reader, num_workers, samples)
