"""Publishes files: a file gets its final name only when it is complete, and only one process writes a directory.

A file is written under a temporary name, fsynced and renamed; then its directory is fsynced.
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

# Descriptors of this process's locks. A forked child closes its copies, or the lock would outlive its holder.
_locks: set[int] = set()


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_locks)


def partial_path(path: Path) -> Path:
    """The name of `path` while it is unfinished: `.NAME.partial` in the same directory."""
    return path.with_name(f".{path.name}.partial")


def open_new(path: Path) -> IO[bytes]:
    """Opens a file for writing from its start, without a buffer. A pipe of that name is refused, without waiting."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, 0o666)

    return io.open(path, "wb", buffering=0, opener=opener)  # noqa: UP020 - tests let it fail under this name


def publish(path: Path, unfinished: Path | None = None) -> None:
    """Renames a finished, fsynced file to `path`, durably. `unfinished` is `partial_path(path)` by default."""
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
    """A context that puts `path` into the system's errors about writing it.

    An error of `write` or `fsync` (a full disk) names no file, and one of `open` or `rename` names the unfinished file,
    which the user does not know. If the directory is missing, the error says so.
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
    """Raises `UserError` if no file can be written at `path`, which the user gave with `flag`.

    It is called before long work. It refuses a path that is a directory, or whose directory is missing or not writable.
    """
    name, folder = f"{flag} {path}".strip(), path.parent
    if path.is_dir():
        raise UserError(f"{name}: is a directory; give the name of a file")
    if not folder.is_dir():
        wrong = "is not a directory" if folder.exists() else "does not exist; make it first"
        raise UserError(f"{name}: the directory {folder} {wrong}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{name}: the directory {folder} cannot be written (permission denied)")


def holds(path: Path, content: bytes) -> bool:
    """Whether a file has exactly this content."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def publish_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file, so that `path` has all of its content or does not exist. An `OSError` names `path`."""
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
    """Writes all of `content` at `offset`, in as many calls as the system needs."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """A context that holds the lock file `path` against other processes, also on other machines that share the disk.

    The operating system's lock is used. It ends with the process, however that ends, so a file that a killed process
    left is no lock. On file systems without locks, the file `PATH.held` is the lock (see
    `sdpnet.pipelines.files.lock`).

    Raises `UserError` with the holder's name if the lock is held. Nothing was changed then, except that `path` may have
    been created.
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
                other = _owner(path)  # a holder on another machine, where the system has locks
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
        os.close(descriptor)  # its holder finished and removed the file while we waited for the lock
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
        if descriptor in _locks:  # a forked child has closed its copy
            _locks.remove(descriptor)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)
            if soft is not None:
                soft_lock.release(soft)


def _owner(path: Path) -> soft_lock.Owner:
    """The process that a lock file names, or an empty dictionary."""
    try:
        return soft_lock.owner_of(path)
    except FileNotFoundError:
        return {}


def _held(path: Path, owner: soft_lock.Owner, soft: Path | None = None) -> UserError:
    who = f"another run (process {owner['pid']} on {owner['host']})" if owner else "another run"
    remedy = "wait for it, or choose another folder"
    if soft is not None:
        remedy += f" (if no such run exists any more, remove {soft})"
    return UserError(f"{path.parent}: {who} is writing here; {remedy}")
