"""Opens the files of a shard set safely.

A file's type and size are checked before a byte is read, and a mapped file stays the one that was checked, even if
another file takes its name.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import weakref
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file
from sdpnet.pipelines.native import decoder as native_decoder

__all__ = ["Identity", "MappedFile", "open_regular", "open_with_room", "read_whole", "size_of"]

_COPY: Final = "copy it again"
_PIECE: Final = 1 << 23  # the number of bytes per read

Identity = tuple[int, int, int, int]  # device, inode, size, modification time in ns


def open_regular(path: str | os.PathLike[str]) -> int:
    """Opens a regular file, or a link to one, for reading. Returns the descriptor; never waits for a pipe's writer.

    Raises `ShardError` if it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    try:
        return open_with_room(path)
    except NotRegularError as error:
        raise ShardError(
            f"{os.fspath(path)}: cannot be read (it is {error.kind}, not a file of data); {_COPY}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file system allows
        reason = getattr(error, "strerror", None) or error
        raise ShardError(f"{os.fspath(path)}: cannot be read ({reason}); {_COPY}") from None


def open_with_room(path: str | os.PathLike[str]) -> int:
    """Opens a regular file; if this process has too many open files, it raises the limit and tries again.

    Raises `NotRegularError` and `OSError` as `open_regular_file` does.
    """
    try:
        return open_regular_file(path)
    except OSError as error:
        if error.errno != errno.EMFILE or not _more_descriptors():
            raise
    return open_regular_file(path)


def _more_descriptors() -> bool:
    """Raises this process's limit on open files to its hard limit. Returns whether it was raised.

    The reader of a set of many tars holds all of them open.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return False
    return True


def size_of(path: str | os.PathLike[str]) -> int:
    """The number of bytes of a regular file. Raises `ShardError` as `open_regular` does."""
    descriptor = open_regular(path)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def read_whole(path: str | os.PathLike[str], limit: int, why: str) -> bytes:
    """Reads a whole regular file.

    Args:
        path: the file.
        limit: the number of bytes that it may have.
        why: the limit in words, for the error.

    Raises:
        ShardError: the file is larger, or `open_regular` refuses it.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise ShardError(f"{os.fspath(path)}: {size:,} bytes, more than {why}; {_COPY}")
        return _read(descriptor, 0, size)
    except OSError as error:
        raise ShardError(f"{os.fspath(path)}: cannot be read ({error.strerror}); {_COPY}") from None
    finally:
        os.close(descriptor)


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """Reads `size` bytes from `offset` on, or fewer if the file ends before."""
    content = bytearray()
    while len(content) < size:
        piece = os.pread(descriptor, min(size - len(content), _PIECE), offset + len(content))
        if not piece:
            break
        content += piece
    return bytes(content)


class MappedFile:
    """A regular file that is opened and mapped once.

    If another file takes its name later, the object is not affected. If the file is changed in place, `check` raises an
    error. If a part of the file is cut off and read nevertheless, the native library (if it is built) puts zeros in its
    place, where the system would end the process, and `check` raises an error.

    The object can be pickled. The other process opens the file again, and it must still be the same one.

    Attributes:
        path: the path as it was given.
        identity: device, inode, size and modification time of the file when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], size: int | None = None) -> None:
        """Opens a file. `size` is its expected number of bytes, if known.

        Raises `ShardError` as `open_regular` does, and if the file's size differs from `size`.
        """
        self.path = Path(path)
        self.descriptor = open_regular(self.path)
        weakref.finalize(self, os.close, self.descriptor)
        self.identity = _identity(os.fstat(self.descriptor))
        self._map: np.ndarray | None = None
        self._guard: int | None = None
        if size is not None and self.size != size:
            raise ShardError(
                f"{self.path}: {self.size:,} bytes, not the manifest's {size:,}: truncated or replaced; {_COPY}"
            )

    @property
    def size(self) -> int:
        """The number of bytes of the file when it was opened."""
        return self.identity[2]

    @property
    def data(self) -> np.ndarray:
        """The whole file as a read-only view, uint8 (size,)."""
        if self._map is None:
            self._map = self._mapped()
        return self._map

    def _mapped(self) -> np.ndarray:
        size = self.size
        if size == 0:
            return np.zeros(0, np.uint8)
        arguments: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        try:
            mapping = mmap.mmap(self.descriptor, size, access=mmap.ACCESS_READ, **arguments)
        except OSError as error:
            if error.errno != errno.EMFILE or not _more_descriptors():
                raise ShardError(f"{self.path}: cannot be mapped into memory ({error.strerror})") from None
            mapping = mmap.mmap(self.descriptor, size, access=mmap.ACCESS_READ, **arguments)
        except ValueError:  # the file has become shorter
            self._fail()
        data = np.frombuffer(mapping, np.uint8)
        if native_decoder.available():
            self._guard = native_decoder.guard_mapping(data.ctypes.data, size)
            if self._guard is not None:
                weakref.finalize(mapping, native_decoder.release_mapping, self._guard).atexit = False
        return data

    def read(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """Copies `count` records from byte `start` on. Raises `ShardError` if the file has become shorter."""
        try:
            content = _read(self.descriptor, start, count * dtype.itemsize)
        except OSError as error:
            raise ShardError(f"{self.path}: cannot be read ({error.strerror}); {_COPY}") from None
        if len(content) != count * dtype.itemsize:
            self._fail()
        return np.frombuffer(content, dtype)

    def view(self, start: int, size: int) -> np.ndarray:
        """Bytes of the file, read-only uint8 (size,).

        They are a view of the map, or a copy if the map is not guarded, because a cut file would then end the process.
        """
        data = self.data
        if self._guard is not None:
            return data[start : start + size]
        return self.read(np.dtype(np.uint8), start, size)

    def check(self) -> None:
        """Raises `ShardError` if the file was changed since it was opened. Takes about a microsecond."""
        if _identity(os.fstat(self.descriptor)) != self.identity:
            self._fail()
        if self._guard is not None and native_decoder.mapping_is_damaged(self._guard):
            raise ShardError(f"{self.path}: a part of it cannot be read: the disk has failed, or it was cut; {_COPY}")

    def _fail(self) -> NoReturn:
        size = os.fstat(self.descriptor).st_size
        how = "was changed" if size == self.size else f"now has {size:,} bytes instead of {self.size:,}"
        raise ShardError(f"{self.path}: {how} while it was in use: its tables no longer fit; {_COPY} and start again")

    def has_its_name(self) -> bool:
        """Whether `path` still leads to this file, unchanged since it was opened."""
        return _names(self.path, self.identity)

    def open_path(self) -> str:
        """A path by which other libraries of this process open exactly this file, even if another one has its name now.

        If the system has no such path, it is `path` itself. Raises `ShardError` if that leads to another file by now.
        """
        for folder in ("/proc/self/fd", "/dev/fd"):
            if _names(f"{folder}/{self.descriptor}", self.identity):
                return f"{folder}/{self.descriptor}"
        if not self.has_its_name():
            raise ShardError(f"{self.path}: was replaced while it was in use; start again")
        return str(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.path, self.identity)


def _opened_again(path: Path, identity: Identity) -> MappedFile:
    """Opens a file again in the process that a `MappedFile` was sent to."""
    file = MappedFile(path)
    if file.identity != identity:
        raise ShardError(f"{path}: was changed or replaced since another process opened it; start again")
    return file


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _names(path: str | Path, identity: Identity) -> bool:
    try:
        return _identity(os.stat(path)) == identity
    except OSError:
        return False
