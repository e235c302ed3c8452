"""Symbolic links in a walk: links to missing files, and links to a folder that contains the link."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["LOOPS", "NOWHERE", "is_file", "is_folder", "links_to_ancestor"]

LOOPS: Final = "links to a folder that they lie in"
NOWHERE: Final = "links to files that are not there"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one. False for a link that cannot be followed, such as one to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a regular file or a link to one. False for a link that cannot be followed."""
    try:
        return entry.is_file()
    except OSError:
        return False


def links_to_ancestor(link: str) -> bool:
    """Whether a link leads to a folder that contains the link, by its path or by the real path of its folder.

    A walk that follows such a link would not end.
    """
    folder = Path(link).parent
    real = Path(os.path.realpath(folder))
    target = _identity(Path(link))
    return target is not None and any(
        _identity(above) == target for above in (folder, *folder.parents, real, *real.parents)
    )


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
