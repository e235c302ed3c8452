"""A file appears under its final name only when it is complete, and only one process writes a directory.

Temporary name, fsync, rename, fsync of the directory.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files import lock as soft_lock

__all__ = [
    "errors_name",
    "exclusive",
    "holds",
    "open_new",
    "partial_path",
    "publish",
    "publish_bytes",
    "require_place",
    "sync_directory",
    "write_all",
]

_locks: set[int] = set()  # descriptors of this process; while a forked child has them too, a lock outlives its holder


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_locks)


def partial_path(path: Path) -> Path:
    """The name that `path` has while it is unfinished: `.NAME.partial` in the same directory."""
    return path.with_name(f".{path.name}.partial")


def open_new(path: Path) -> IO[bytes]:
    """Opens a file to be written from its start, without a buffer. A pipe of that name is refused, not waited for."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, 0o666)

    return io.open(path, "wb", buffering=0, opener=opener)  # noqa: UP020 - tests let it fail under this name


def publish(path: Path, unfinished: Path | None = None) -> None:
    """Gives the finished, fsynced `unfinished` (default: `partial_path(path)`) its final name, lastingly."""
    os.replace(unfinished or partial_path(path), path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Waits until the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Makes the system's refusals to write `path` name it.

    An error of `write` or `fsync` (a full disk) names no file, and one of `open` or `rename` names the unfinished file
    beside it, which nobody asked for. Where the directory is missing, the error says so.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", str(path), str(partial_path(path))):
            raise
        reason = error.strerror
        if isinstance(error, FileNotFoundError) and not path.parent.exists():
            reason = f"{reason} (make the directory {path.parent} first)"
        raise OSError(error.errno, reason, str(path)) from error


def require_place(path: Path, flag: str = "") -> None:
    """Raises `UserError` when no file can be written at `path`, which the user gave with `flag`: for what takes long.

    Said before the work: it is a directory, or the directory that it would be in is missing or not to be written.
    """
    name, folder = f"{flag} {path}".strip(), path.parent
    if path.is_dir():
        raise UserError(f"{name}: is a directory; give the name of a file")
    if not folder.is_dir():
        wrong = "is not a directory" if folder.exists() else "is not there; make it first"
        raise UserError(f"{name}: the directory {folder} {wrong}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{name}: the directory {folder} cannot be written (permission denied)")


def holds(path: Path, content: bytes) -> bool:
    """Whether a file has exactly this content."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def publish_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file so that `path` holds all of it or does not exist. An `OSError` names `path`."""
    with errors_name(path):
        try:
            with open_new(partial_path(path)) as file:
                write_all(file.fileno(), content, 0)
                os.fsync(file.fileno())
            publish(path)
        except BaseException:
            with suppress(OSError):
                partial_path(path).unlink()
            raise


def write_all(descriptor: int, content: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `content` at `offset`, however little of it the system takes at a time."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file `path` against other processes, on this machine and, on a shared disk, on others.

    The lock is the operating system's and ends with the process, however that ends: a file that a killed process left
    is no lock. Where the file system has no locks, the file `PATH.held` is the lock (see
    `sdpnet.pipelines.files.lock`).

    Raises `UserError`, saying who holds it; then nothing was changed but that `path` may have been made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        soft: Path | None = None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _held(path, _owner(path)) from None
            except OSError:
                soft = path.with_name(f"{path.name}.held")
                other = _owner(path)  # with locks of the system, on another machine
                if other and other["pid"] != os.getpid() and soft_lock.is_alive(other):
                    raise _held(path, other) from None
                if (owner := soft_lock.acquire(soft)) is not None:
                    raise _held(path, owner, soft) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it, on finishing, while we waited for the lock
        if soft is not None:
            soft_lock.release(soft)
    _locks.add(descriptor)
    try:
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        with errors_name(path):
            os.ftruncate(descriptor, 0)
            write_all(descriptor, text, 0)
        yield
    finally:
        if descriptor in _locks:  # not in a forked child
            _locks.remove(descriptor)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)
            if soft is not None:
                soft_lock.release(soft)


def _owner(path: Path) -> soft_lock.Owner:
    """Whom a lock file names, if anybody."""
    try:
        return soft_lock.owner_of(path)
    except FileNotFoundError:
        return {}


def _held(path: Path, owner: soft_lock.Owner, soft: Path | None = None) -> UserError:
    who = f"another run (process {owner['pid']} on {owner['host']})" if owner else "another run"
    remedy = "wait for it, or choose another folder"
    if soft is not None:
        remedy += f" (if no such run is there any more, remove {soft})"
    return UserError(f"{path.parent}: {who} is writing here; {remedy}")
