"""Opens regular files for reading, and refuses anything else. Imports very little, since workers start with it."""

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
    """A path leads to something other than a regular file. `kind` says what it is, such as "a named pipe"."""

    def __init__(self, mode: int) -> None:
        super().__init__("not a file")
        self.kind = _KINDS.get(stat.S_IFMT(mode), "a special file")


def open_regular_file(path: str | os.PathLike[str]) -> int:
    """Opens a regular file, or a link to one, for reading. Returns the descriptor; never waits for a pipe's writer.

    Raises `NotRegularError` for a folder, a pipe, a socket or a device, and `OSError` if it cannot be opened.
    """
    # Checked before opening, because opening a device can have effects (a tape winds), and again after, because the
    # path may lead to something else by then.
    _require_regular(os.stat(path).st_mode)
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
