"""Things in place of a file that must not be read: pipes, devices, folders, broken links, huge sparse files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["SPECIAL_FILES"]


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "named pipe": lambda path: os.mkfifo(path),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "folder": lambda path: path.mkdir(),
    "sparse terabyte": _sparse,
    "empty file": lambda path: path.touch(),
}
"""Functions by name; each creates such a thing at a path."""
