"""Opens regular files to be read, whatever lies under their names. Imports next to nothing: workers start with it."""

from __future__ import annotations

import os
import stat
from typing import Final

__all__ = ["NotRegularError", "open_regular_file"]

_KINDS: Final = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegularError(ValueError):
    """What lies at a path is no regular file. `kind` says what it is, such as "a named pipe"."""

    def __init__(self, mode: int) -> None:
        super().__init__("not a file")
        self.kind = _KINDS.get(stat.S_IFMT(mode), "a special file")


def open_regular_file(path: str | os.PathLike[str]) -> int:
    """A descriptor to read a regular file, or what a link leads to if that is one; never waits for a writer.

    Raises `NotRegularError` for a folder, a pipe, a socket or a device, and `OSError` for what cannot be opened.
    """
    _require_regular(os.stat(path).st_mode)  # before it is opened, which may wind a tape
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(os.fstat(descriptor).st_mode)
    except NotRegularError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegularError(mode)
