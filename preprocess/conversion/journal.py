"""What survives a kill: which images are on disk for good, said in an append-only journal.

    NAME.records     one `RECORD_DTYPE` record an image, in the order of the source
    journal.jsonl    a line each time that data and records have reached the disk: how many records count

A line is its CRC-32 in hex and a JSON object. What was cut off or damaged, and all after it, is dropped on opening.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.publish import write_all
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file

__all__ = [
    "BAD",
    "JOURNAL_NAME",
    "KEPT",
    "RECORD_DTYPE",
    "REENCODED",
    "Journal",
    "Records",
    "open_plain",
    "read_journal",
    "require_bytes",
]

JOURNAL_NAME: Final = "journal.jsonl"
_MAX_LINE: Final = 1 << 27  # bytes; the names of a million classes take a tenth of that
REENCODED, KEPT, BAD = 1, 2, 3  # what became of an image
RECORD_DTYPE = np.dtype(
    [("size", "<u4"), ("crc32", "<u4"), ("label", "<i4"), ("height", "<u2"), ("width", "<u2"), ("state", "u1")]
)
_RECORD: Final = struct.Struct("<IIiHHB")  # the same


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a journal and the bytes that they take; nothing when there is no such file.

    Raises `UserError` for what no conversion has written.
    """
    entries: list[dict[str, Any]] = []
    end = 0
    if os.path.lexists(path):
        with open_plain(path) as file:
            while line := file.readline(_MAX_LINE):
                checksum, _, text = line.partition(b" ")
                if len(line) == _MAX_LINE:
                    raise _not_ours(path)
                if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                    break
                try:
                    entry = json.loads(text)
                except (ValueError, RecursionError):
                    raise _not_ours(path) from None
                if not isinstance(entry, dict):
                    raise _not_ours(path)
                entries.append(entry)
                end += len(line)
    return entries, end


def open_plain(path: Path) -> BinaryIO:
    """Opens a file of unfinished work to be read. Raises `UserError` for a pipe or the like, and waits for none."""
    try:
        return open(open_regular_file(path), "rb")
    except NotRegularError:
        raise _not_ours(path) from None


def _not_ours(path: Path) -> UserError:
    return UserError(f"{path}: is no file of a conversion; remove {path.parent} to start over")


class Journal:
    """An append-only list of JSON objects; `append` returns when its entry is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, end = read_journal(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._file, end)
        self._end = end

    def append(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry, sort_keys=True).encode() + b"\n"
        line = b"%08x %s" % (zlib.crc32(text), text)
        write_all(self._file, line, self._end)
        os.fsync(self._file)
        self._end += len(line)
        self.entries.append(entry)

    def close(self) -> None:
        os.close(self._file)


class Records:
    """The records of one split's images, appended one by one. `done` is their number and their bytes' CRC-32.

    Raises `UserError` when the file does not have the `count` records with the checksum `crc32` that the journal says.
    """

    def __init__(self, path: Path, count: int, crc32: int) -> None:
        self.path = path
        self.done = (count, crc32)  # in one, because Ctrl-C may come between any two assignments
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise _not_ours(path)
        os.ftruncate(self._file, min(os.fstat(self._file).st_size, count * RECORD_DTYPE.itemsize))
        complete = os.fstat(self._file).st_size == count * RECORD_DTYPE.itemsize
        found = 0
        for piece in self.pieces() if complete else ():
            found = zlib.crc32(piece.tobytes(), found)
        if not complete or found != crc32:
            os.close(self._file)
            raise UserError(f"{path}: is not as the journal beside it says; remove {path.parent} to start over")

    @property
    def count(self) -> int:
        return self.done[0]

    def append(self, record: tuple[int, int, int, int, int, int]) -> None:
        """Adds (size, crc32, label, height, width, state)."""
        content = _RECORD.pack(*record)
        count, crc32 = self.done
        write_all(self._file, content, count * RECORD_DTYPE.itemsize)
        self.done = (count + 1, zlib.crc32(content, crc32))

    def sync(self) -> None:
        os.fsync(self._file)

    def pieces(self, length: int = 65_536) -> Iterator[np.ndarray]:
        """The records in pieces, `RECORD_DTYPE` (up to `length`,), read from the file as they are used."""
        if self.count:
            records = np.memmap(self.path, RECORD_DTYPE, mode="r")
            for start in range(0, self.count, length):
                yield records[start : min(start + length, self.count)]

    def close(self) -> None:
        os.close(self._file)


def require_bytes(file: int, size: int, path: Path) -> None:
    """Raises `UserError` when an open file is shorter than the images in it that the journal counts."""
    found = os.fstat(file).st_size
    if found < size:
        raise UserError(
            f"{path}: {found:,} bytes, but the journal beside it counts images to byte {size:,}; remove {path.parent} "
            "to start over"
        )
