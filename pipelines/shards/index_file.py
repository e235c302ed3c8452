"""The index of images that lie elsewhere as they are: SPLIT.index, its format and its validator.

All integers are little-endian:

    header (48 bytes) | folders (8 bytes each) | containers (32 bytes each) | samples (24 bytes each)
    | with flag 1: CRC-32 of each image (4 bytes each) | names

A container is a file that holds images: one image, or all images of a tar. Its path is FOLDER/NAME. The names are the
paths of all folders and then the names of all containers, each followed by a zero byte, without gaps. The path of a
folder is absolute, or relative to the folder of the index (empty for that folder itself), so that images and index can
be moved together.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.beton import CRC32_DTYPE, MAX_PIXELS_PER_BYTE
from sdpnet.pipelines.shards.file import MappedFile

__all__ = [
    "ANY_TIME",
    "CONTAINER_DTYPE",
    "FOLDER_DTYPE",
    "HEADER_DTYPE",
    "INDEX_AGAIN",
    "INDEX_VERSION",
    "MAGIC",
    "MAX_NAME",
    "SAMPLE_DTYPE",
    "WITH_CHECKSUMS",
    "Index",
    "difference",
    "has_checksums",
]

MAGIC: Final = b"sdpindex"
INDEX_VERSION: Final = 1
WITH_CHECKSUMS: Final = 1  # a flag
ANY_TIME: Final = -(1 << 63)  # of a file that belongs to the shard set, whose SHA-256 is in the manifest
INDEX_AGAIN: Final = "put the old file back, or index the images again: sdpnet adopt --replace"

HEADER_DTYPE = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("flags", "<u4"),
        ("num_samples", "<u8"),
        ("num_containers", "<u8"),
        ("num_folders", "<u8"),
        ("names_size", "<u8"),
    ]
)
FOLDER_DTYPE = np.dtype("<u8")  # where its path begins in the names
# `size` and `mtime_ns` are those of the file when it was indexed; ANY_TIME is not compared. `name_start` is where its
# name begins in the names.
CONTAINER_DTYPE = np.dtype(
    [("size", "<i8"), ("mtime_ns", "<i8"), ("name_start", "<u8"), ("folder", "<u4"), ("zero", "<u4")]
)
# `offset` is the position of the image's first byte in its container.
SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("container", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("label", "<u4"),
    ]
)
_COUNTS: Final = ("num_samples", "num_containers", "num_folders", "names_size")
_PIECE: Final = 65_536  # the number of records that are checked at a time
MAX_NAME: Final = 255  # bytes, the limit of file systems
_LONGEST_PATH: Final = 4096
_SLASH, _DOT = ord("/"), ord(".")


def has_checksums(file: MappedFile) -> bool:
    """Whether the header of an index says that it has a checksum of each image. The tables are not checked."""
    return bool(file.read(HEADER_DTYPE, 0, 1)[0]["flags"] & WITH_CHECKSUMS)


class Index:
    """A validated index file.

    The tables are views of the mapped file if the native library is built, else copies.

    Attributes:
        file: the index file.
        containers: `CONTAINER_DTYPE` (num_containers,).
        samples: `SAMPLE_DTYPE` (num_samples,).
        checksums: the CRC-32 of each image, uint32 (num_samples,); None if they are not stored.
        names: uint8 (names_size,), the names of folders and containers.
        folders: uint8 (n,), the absolute paths of all folders, each followed by a zero byte.
        folder_starts: uint64 (num_folders,), where each path begins in `folders`.
    """

    def __init__(self, file: MappedFile) -> None:
        """Reads and checks an open index file.

        Time and memory are proportional to the number of records before the first invalid one. No container is opened.

        Raises:
            ShardError: the file is invalid. The message names the file, the invalid part and what to do.
        """
        self.file = file
        folder_starts = self._read_tables()
        _Checks(self, folder_starts).run()
        self.folders, self.folder_starts = self._absolute(folder_starts)
        file.check()

    def _read_tables(self) -> np.ndarray:
        """Checks the header and finds the tables. Returns that of the folders."""
        file = self.file
        if file.size < HEADER_DTYPE.itemsize:
            raise self.refusal(f"only {file.size} bytes, shorter than the header of an index")
        header = file.read(HEADER_DTYPE, 0, 1)[0]
        if header["magic"] != MAGIC:
            raise self.refusal("not an index of images")
        if header["version"] != INDEX_VERSION:
            raise ShardError(
                f"{file.path}: an index of version {header['version']}, but this sdpnet reads version {INDEX_VERSION}; "
                "index the images again, or use the sdpnet that wrote it"
            )
        if header["flags"] not in (0, WITH_CHECKSUMS):
            raise self.refusal(f"unknown flags {header['flags']}")
        num_samples, num_containers, num_folders, names_size = (int(header[name]) for name in _COUNTS)
        num_checksums = num_samples if header["flags"] else 0
        parts = (
            (FOLDER_DTYPE, num_folders),
            (CONTAINER_DTYPE, num_containers),
            (SAMPLE_DTYPE, num_samples),
            (CRC32_DTYPE, num_checksums),
            (np.dtype(np.uint8), names_size),
        )
        needed = HEADER_DTYPE.itemsize + sum(dtype.itemsize * count for dtype, count in parts)
        if needed != file.size:
            raise self.refusal(f"{file.size:,} bytes, but its header announces {needed:,}")
        start = HEADER_DTYPE.itemsize
        tables: list[np.ndarray] = []
        for dtype, count in parts:
            size = dtype.itemsize * count
            tables.append(file.view(start, size).view(dtype))
            start += size
        self.containers, self.samples, checksums, self.names = tables[1:]
        self.checksums = checksums if header["flags"] else None
        return tables[0]

    def refusal(self, problem: str) -> ShardError:
        return ShardError(f"{self.file.path}: {problem}; the file is damaged: copy it again, or index the images again")

    def _absolute(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The paths of all folders as absolute paths, and where each begins."""
        # Relative paths begin at the real folder, because they were computed without links ("link/.." is not the folder
        # of the link).
        here = os.fsencode(os.path.realpath(os.path.dirname(self.file.path)))
        end = int(self.containers["name_start"][0]) if len(self.containers) else len(self.names)
        paths = self.names[:end].tobytes().split(b"\0")[:-1] if len(starts) else []
        absolute = [path if path.startswith(b"/") else os.path.normpath(os.path.join(here, path)) for path in paths]
        lengths = np.array([len(path) + 1 for path in absolute], np.uint64)
        blob = np.frombuffer(b"".join(path + b"\0" for path in absolute), np.uint8)
        return blob, np.cumsum(lengths, dtype=np.uint64) - lengths

    def path(self, container: int) -> str:
        """The absolute path of a container."""
        record = self.containers[container]
        folder = _text_at(self.folders, int(self.folder_starts[record["folder"]]), _LONGEST_PATH * 2)
        return os.fsdecode(folder + b"/" + _text_at(self.names, int(record["name_start"]), MAX_NAME + 1))

    def changed(self) -> Iterator[tuple[int, str]]:
        """Yields the containers that are missing or have another size or modification time: (container, how)."""
        self.file.check()
        for first in range(0, len(self.containers), _PIECE):
            piece = self.containers[first : first + _PIECE]
            records = zip(piece["size"].tolist(), piece["mtime_ns"].tolist(), strict=True)
            for number, record in enumerate(records, first):
                try:
                    status = os.stat(self.path(number))
                except (OSError, ValueError) as error:
                    yield number, _why(error)
                    continue
                if how := difference(status, *record):
                    yield number, how
        self.file.check()


def difference(status: os.stat_result, size: int, mtime_ns: int) -> str:
    """Describes how a file differs from the indexed one, as the predicate of a sentence; "" if it does not."""
    if not stat.S_ISREG(status.st_mode):
        return "is not a file of data any more"
    if status.st_size != size:
        return f"has changed: {status.st_size} bytes instead of {size}"
    if mtime_ns not in (ANY_TIME, status.st_mtime_ns):
        return "has changed: it was written after it was indexed"
    return ""


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "is not there any more"
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def _text_at(blob: np.ndarray, start: int, longest: int) -> bytes:
    return blob[start : start + longest].tobytes().partition(b"\0")[0]


class _Checks:
    """The checks of an index's tables, a piece at a time.

    A sparse file may claim more records than fit into memory, but then its first ones are invalid already.
    """

    def __init__(self, index: Index, folder_starts: np.ndarray) -> None:
        self._index, self._folder_starts, self._names_size = index, folder_starts, len(index.names)
        self._used = np.zeros(0, bool)

    def run(self) -> None:
        index = self._index
        names_begin = int(index.containers["name_start"][0]) if len(index.containers) else self._names_size
        self._strings("folder", self._folder_starts, 0, names_begin, self._check_folders)
        self._strings("container", index.containers, names_begin, self._names_size, self._check_containers)
        for first in range(0, len(index.samples), _PIECE):
            self._check_samples(first, index.samples[first : first + _PIECE])
        if not self._used.all():
            raise index.refusal(f"container {int(np.flatnonzero(~self._used)[0])}: holds no image")

    def _require(self, what: str, first: int, ok: np.ndarray, problem: str) -> None:
        if not ok.all():
            raise self._index.refusal(f"{what} {first + int(np.flatnonzero(~ok)[0])}: {problem}")

    def _strings(
        self,
        what: str,
        table: np.ndarray,
        begin: int,
        end: int,
        check: Callable[[int, np.ndarray, np.ndarray, np.ndarray], None],
    ) -> None:
        """Checks that the strings of a table follow each other from `begin` to `end` of the names, without gaps."""
        if begin > end or end > self._names_size or (begin != end and not len(table)):
            raise self._index.refusal("the places of its names do not fit")
        for first in range(0, len(table), _PIECE):
            piece = table[first : first + _PIECE]
            starts = piece if what == "folder" else piece["name_start"]
            following = table[first + len(piece) : first + len(piece) + 1]
            last = following if what == "folder" else following["name_start"]
            edges = np.concatenate([starts, last if len(last) else np.array([end], np.uint64)])
            if first == 0 and int(edges[0]) != begin:
                raise self._index.refusal(f"{what} 0: its name begins at another place")
            self._require(what, first, (edges[:-1] < edges[1:]) & (edges[1:] <= np.uint64(end)), "a name out of order")
            low, high = int(edges[0]), int(edges[-1])
            text = self._index.names[low:high]
            ends = (edges[1:] - edges[0]).astype(np.int64) - 1
            self._require(what, first, text[ends] == 0, "a name without an end")
            if int(np.count_nonzero(text == 0)) != len(piece):
                raise self._index.refusal(f"the names of {what}s {first} to {first + len(piece) - 1} have zero bytes")
            check(first, piece, text, ends)

    def _check_folders(self, first: int, piece: np.ndarray, text: np.ndarray, ends: np.ndarray) -> None:
        self._require("folder", first, np.diff(ends, prepend=-1) <= _LONGEST_PATH, "its path is too long")

    def _check_containers(self, first: int, piece: np.ndarray, text: np.ndarray, ends: np.ndarray) -> None:
        def require(ok: np.ndarray, problem: str) -> None:
            self._require("container", first, ok, problem)

        lengths = np.diff(ends, prepend=-1) - 1
        starts = ends - lengths
        require((lengths >= 1) & (lengths <= MAX_NAME), "its name has no length that file names have")
        dots = (text[starts] == _DOT) & ((lengths == 1) | ((lengths == 2) & (text[starts + lengths - 1] == _DOT)))
        require(~dots, "its name is that of a folder")
        slashes = np.flatnonzero(text == _SLASH)
        if len(slashes):
            bad = first + int(np.searchsorted(ends, slashes[0]))
            raise self._index.refusal(f"container {bad}: its name is a path")
        require(piece["size"] > 0, "a file without bytes")
        require(piece["folder"] < len(self._folder_starts), "its folder is not in the table")
        require(piece["zero"] == 0, "bytes that are not used must be zero")

    def _check_samples(self, first: int, piece: np.ndarray) -> None:
        def require(ok: np.ndarray, problem: str) -> None:
            self._require("sample", first, ok, problem)

        containers = self._index.containers
        require(piece["container"] < len(containers), "its container is not in the table")
        if not len(self._used):
            self._used = np.zeros(len(containers), bool)
        self._used[piece["container"]] = True
        whole = containers["size"][piece["container"]].astype(np.uint64)
        sizes = piece["size"].astype(np.uint64)
        require((sizes > 0) & (sizes <= whole), "impossible size")
        require(piece["offset"] <= whole - sizes, "its image lies outside its container")
        require((piece["height"] > 0) & (piece["width"] > 0), "an image without pixels")
        pixels = piece["height"].astype(np.uint64) * piece["width"]
        require(pixels <= sizes * np.uint64(MAX_PIXELS_PER_BYTE), "more pixels than its bytes can hold")
