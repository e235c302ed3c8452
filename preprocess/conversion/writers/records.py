"""The records of the images of a split, which tell a later run what an earlier one has written.

    NAME.records     one `RECORD_DTYPE` record for each image, in the order of the source

The journal (`sdpnet.preprocess.conversion.journal`) says how many of them are valid.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import write_all
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file

__all__ = ["RECORD_DTYPE", "Records", "foreign_file", "open_plain", "require_bytes"]

RECORD_DTYPE = np.dtype(
    [("size", "<u4"), ("crc32", "<u4"), ("label", "<i4"), ("height", "<u2"), ("width", "<u2"), ("state", "u1")]
)  # `state` is `sdpnet.preprocess.workers.result.ImageState`
_RECORD: Final = struct.Struct("<IIiHHB")  # the same layout


def open_plain(path: Path) -> BinaryIO:
    """Opens a file of unfinished work for reading. Raises `UserError` for a pipe or device, without waiting for it."""
    try:
        return open(open_regular_file(path), "rb")
    except NotRegularError:
        raise foreign_file(path) from None


def foreign_file(path: Path) -> UserError:
    """The error for a file in a folder of unfinished work that was not written by a conversion."""
    return UserError(f"{path}: was not written by a conversion; remove {path.parent} to start over")


class Records:
    """The records of the images of one split, to which one after the other is appended.

    Records beyond `count` are cut off when the file is opened: they were written after the last line of the journal.

    Attributes:
        done: the number of records, and the CRC-32 of their bytes.

    Args:
        path: the file.
        count: the number of records according to the journal.
        crc32: the CRC-32 of their bytes according to the journal.

    Raises:
        UserError: the file has fewer records, or they have another checksum.
    """

    def __init__(self, path: Path, count: int, crc32: int) -> None:
        self.path = path
        self.done = (count, crc32)  # one tuple, because Ctrl-C may come between two assignments
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise foreign_file(path)
        os.ftruncate(self._file, min(os.fstat(self._file).st_size, count * RECORD_DTYPE.itemsize))
        complete = os.fstat(self._file).st_size == count * RECORD_DTYPE.itemsize
        found = 0
        for piece in self.pieces() if complete else ():
            found = zlib.crc32(piece.tobytes(), found)
        if not complete or found != crc32:
            os.close(self._file)
            raise UserError(f"{path}: does not match the journal beside it; remove {path.parent} to start over")

    @property
    def count(self) -> int:
        """The number of records."""
        return self.done[0]

    def append(self, record: tuple[int, int, int, int, int, int]) -> None:
        """Appends a record: (size, crc32, label, height, width, state)."""
        content = _RECORD.pack(*record)
        count, crc32 = self.done
        write_all(self._file, content, count * RECORD_DTYPE.itemsize)
        self.done = (count + 1, zlib.crc32(content, crc32))

    def sync(self) -> None:
        """Waits until all records are on the disk. It may be called from another thread."""
        os.fsync(self._file)

    def pieces(self, length: int = 65_536) -> Iterator[np.ndarray]:
        """Yields the records in arrays of `RECORD_DTYPE`, (up to `length`,), which read from the file when used."""
        if self.count:
            records = np.memmap(self.path, RECORD_DTYPE, mode="r")
            for start in range(0, self.count, length):
                yield records[start : min(start + length, self.count)]

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def require_bytes(file: int, size: int, path: Path) -> None:
    """Raises `UserError` if an open file is shorter than `size`, the end of its images according to the journal."""
    found = os.fstat(file).st_size
    if found < size:
        raise UserError(
            f"{path}: {found:,} bytes, but the journal beside it counts images to byte {size:,}; remove {path.parent} "
            "to start over"
        )
