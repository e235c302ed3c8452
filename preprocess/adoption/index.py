"""The engine: looks at all images of a split and writes its index. The images stay where they are.

SplitScan -> Lookers (headers) -> the images that no reader can take as they are -> Workers -> SPLIT.converted
                               -> all others                                               -> SPLIT.index
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import open_new, write_all
from sdpnet.pipelines.shards.index_file import ANY_TIME, SAMPLE_DTYPE, difference
from sdpnet.pipelines.shards.layout import sha256_of
from sdpnet.pipelines.shards.manifest import Split
from sdpnet.preprocess.adoption.containers import Containers
from sdpnet.preprocess.adoption.look import State
from sdpnet.preprocess.adoption.lookers import CHUNK, RECORD, Chunk, Lookers
from sdpnet.preprocess.adoption.write import write_index
from sdpnet.preprocess.conversion.progress import Meter
from sdpnet.preprocess.encoding.encode import EncodeSettings
from sdpnet.preprocess.sources.files.location import Location
from sdpnet.preprocess.sources.listing import SplitImages
from sdpnet.preprocess.sources.parquet.row import RowLocation
from sdpnet.preprocess.workers.pool import encode_all
from sdpnet.preprocess.workers.result import Bad

__all__ = ["CONVERTED", "Indexed", "index_split"]

CONVERTED: Final = ".converted"  # the suffix of the file of converted images
_RECORD_DTYPE: Final = np.dtype(
    [
        ("file_size", "<i8"),
        ("mtime_ns", "<i8"),
        ("size", "<i8"),
        ("crc32", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("state", "u1"),
    ]
)
assert _RECORD_DTYPE.itemsize == RECORD.size


@dataclass(frozen=True)
class Indexed:
    """An indexed split.

    Attributes:
        split: its entry in the manifest.
        bad: the images that are left out: the path of each below the source, and the reason.
        num_converted: the number of images in the file of converted images.
    """

    split: Split
    bad: tuple[tuple[str, str], ...]
    num_converted: int


@dataclass
class _Found:
    """What is known about the images of a split: arrays of (num_images,), and the containers."""

    records: np.ndarray
    container_of: np.ndarray
    offsets: np.ndarray
    containers: Containers


def index_split(
    name: str,
    scan: SplitImages,
    out: Path,
    work: Path,
    lookers: Lookers,
    settings: EncodeSettings,
    *,
    num_workers: int,
    checksums: bool = False,
    on_bad: Literal["fail", "skip"] = "fail",
) -> Indexed:
    """Looks at all images of a split and writes its files to `work`. Progress is printed to stderr.

    Args:
        name: the name of the split.
        scan: its images.
        out: the folder of the shard set, in which the files will lie.
        work: the folder in which they are written.
        lookers: the processes that look at the images.
        settings: how to convert the images that cannot be taken as they are.
        num_workers: the number of processes that convert.
        checksums: whether to store the CRC-32 of each image.
        on_bad: how to treat an image that cannot be converted: "fail" ends the command, "skip" leaves it out.

    Raises:
        UserError: an image is bad ("fail"), all images are bad, more images would have to be converted than not, or a
            tar was changed meanwhile.
    """
    found = _look(name, scan, out, lookers)
    odd = np.flatnonzero(found.records["state"] != State.AS_IT_IS)
    if 2 * len(odd) > scan.num_images:
        raise UserError(
            f"{scan.root}: {len(odd):,} of its {scan.num_images:,} {name} images are no JPEGs that can be used as they "
            f"are, such as {scan.relative_path(int(odd[0]))}; convert the data set: sdpnet convert"
        )
    converted = work / f"{name}{CONVERTED}"
    bad = _convert(name, scan, found, odd, converted, out, settings, num_workers, on_bad)
    kept = np.ones(scan.num_images, bool)
    kept[list(bad)] = False
    if not kept.any():
        reason = list(bad.values())[-1]
        raise UserError(f"{name}: none of its {scan.num_images:,} images can be used; the last: {reason}")
    num_converted = len(odd) - len(bad)
    samples = np.zeros(int(kept.sum()), SAMPLE_DTYPE)
    for field in ("size", "height", "width"):
        samples[field] = found.records[field][kept]
    samples["offset"], samples["label"] = found.offsets[kept], scan.labels[kept]
    used, samples["container"] = np.unique(found.container_of[kept], return_inverse=True)
    sizes, mtimes_ns = _status_of_containers(found, converted if num_converted else None)
    is_used = np.zeros(len(found.containers), bool)
    is_used[used] = True
    folders, containers, names = found.containers.tables(sizes, mtimes_ns, is_used)
    crc32 = found.records["crc32"][kept] if checksums else None
    file = write_index(work / f"{name}.index", folders, containers, names, samples, crc32)
    if num_converted:
        file = replace(file, sidecars={converted.name: sha256_of(converted)})
    split = Split(len(samples), "index", (file,), len(bad), len(samples) - num_converted)
    listed = tuple((scan.relative_path(index), reason) for index, reason in bad.items())
    return Indexed(split, listed, num_converted)


def _look(name: str, scan: SplitImages, out: Path, lookers: Lookers) -> _Found:
    """Looks at all images, in tars in the order in which they lie there."""
    count = scan.num_images
    container_of, offsets = np.zeros(count, np.int64), np.zeros(count, np.int64)
    found = _Found(np.zeros(count, _RECORD_DTYPE), container_of, offsets, Containers(out))
    first = scan.locate(0)
    if isinstance(first, RowLocation):
        raise UserError(
            f"{scan.root}: images in Parquet files, which cannot be read where they lie; convert them: sdpnet convert"
        )
    if first.size is None:
        _look_at_all(name, found, np.arange(count), _files(scan, found), lookers)
        return found
    tars: dict[str, int] = {}
    sizes = np.zeros(count, np.int64)
    for index in range(count):
        location = scan.locate(index)
        assert isinstance(location, Location) and location.size is not None
        if (container := tars.get(location.path, -1)) < 0:
            container = tars[location.path] = found.containers.add(location.path)
        container_of[index], offsets[index], sizes[index] = container, location.offset, location.size
    before = {path: os.stat(path) for path in tars}
    paths = list(tars)

    def images(indices: np.ndarray) -> Chunk:
        columns = (values[indices].tolist() for values in (container_of, offsets, sizes))
        return [(paths[container], offset, size) for container, offset, size in zip(*columns, strict=True)]

    _look_at_all(name, found, np.lexsort((offsets, container_of)), images, lookers)
    for path, status in before.items():
        if how := difference(os.stat(path), status.st_size, status.st_mtime_ns):
            raise UserError(f"{path}: {how} while it was read; repeat the command when nobody writes it")
    return found


def _files(scan: SplitImages, found: _Found) -> Callable[[np.ndarray], Chunk]:
    """A function that returns the files of these images, in the order of all images, and collects them."""

    def images(indices: np.ndarray) -> Chunk:
        paths = [scan.locate(index).path for index in indices.tolist()]
        found.container_of[indices] = [found.containers.add(path) for path in paths]
        return [(path, 0, None) for path in paths]

    return images


def _look_at_all(
    name: str, found: _Found, order: np.ndarray, images: Callable[[np.ndarray], Chunk], lookers: Lookers
) -> None:
    chunks = [order[first : first + CHUNK] for first in range(0, len(order), CHUNK)]
    with Meter(name, 0, len(order)) as meter:
        for indices, answer in zip(chunks, lookers.map(map(images, chunks)), strict=True):
            found.records[indices] = np.frombuffer(answer, _RECORD_DTYPE)
            meter.advance(0, len(indices))


def _convert(
    name: str,
    scan: SplitImages,
    found: _Found,
    odd: np.ndarray,
    path: Path,
    out: Path,
    settings: EncodeSettings,
    num_workers: int,
    on_bad: Literal["fail", "skip"],
) -> dict[int, str]:
    """Converts the images that cannot be taken as they are. Returns the index and the reason of each bad one."""
    bad: dict[int, str] = {}
    if not len(odd):
        return bad
    indices, end, container = odd.tolist(), 0, -1
    locate = partial(_locate, scan, indices)
    with (
        open_new(path) as file,
        Meter(f"{name}, to be converted", 0, len(indices)) as meter,
        closing(encode_all(locate, 0, len(indices), settings, num_workers)) as results,
    ):
        for index, result in zip(indices, results, strict=True):
            if isinstance(result, Bad):
                bad[index] = result.reason
                if on_bad == "fail":
                    where = scan.locate(index).name
                    raise UserError(f"{where}: {result.reason} (pass --on-bad skip to skip such images)")
            else:
                if container < 0:
                    container = found.containers.add(str(out / path.name))
                write_all(file.fileno(), result.data, end)
                size = len(result.data)
                found.records[index] = (0, 0, size, result.crc32, result.height, result.width, State.AS_IT_IS)
                found.container_of[index], found.offsets[index] = container, end
                end += size
            meter.advance(len(bad))
        os.fsync(file.fileno())
    if end == 0:
        path.unlink()
    return bad


def _locate(scan: SplitImages, indices: list[int], place: int) -> Location | RowLocation:
    return scan.locate(indices[place])


def _status_of_containers(found: _Found, converted: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The size and the modification time of each container: int64 (num_containers,)."""
    sizes, mtimes_ns = (np.zeros(len(found.containers), np.int64) for _ in range(2))
    seen = found.records["file_size"] > 0
    sizes[found.container_of[seen]] = found.records["file_size"][seen]
    mtimes_ns[found.container_of[seen]] = found.records["mtime_ns"][seen]
    if converted is not None:
        sizes[-1], mtimes_ns[-1] = converted.stat().st_size, ANY_TIME
    return sizes, mtimes_ns
