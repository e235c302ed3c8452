"""A file appears under its final name only when it is complete.

Temporary name, fsync, rename, fsync of the directory.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import UserError

__all__ = ["exclusive", "partial_path", "publish", "publish_bytes"]


def partial_path(path: Path) -> Path:
    """The name that `path` has while it is unfinished: `.NAME.partial` in the same directory."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Gives the finished, fsynced `partial_path(path)` its final name, lastingly."""
    os.replace(partial_path(path), path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def publish_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file so that `path` holds all of it or does not exist."""
    try:
        with partial_path(path).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(path)
    except BaseException:
        partial_path(path).unlink(missing_ok=True)
        raise


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Holds `directory` against a second command that would write the same files.

    Raises `UserError` when another process holds it. The lock ends with the process, however that ends. File
    systems without locks (some network mounts) give no protection.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{directory}: another run is writing here; wait for it, or choose another folder"
            raise UserError(message) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
