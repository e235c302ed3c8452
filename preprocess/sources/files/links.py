"""Symbolic links in a walk: those that lead nowhere, and those that lead to a folder that they lie in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["LOOPS", "NOWHERE", "is_file", "is_folder", "leads_up"]

LOOPS: Final = "links to a folder that they lie in"
NOWHERE: Final = "links to files that are not there"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that cannot be followed, such as one to itself, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a plain file or a link to one; a link that cannot be followed is none."""
    try:
        return entry.is_file()
    except OSError:
        return False


def leads_up(link: str) -> bool:
    """Whether a link to a folder leads to one that the link lies in, by its path or in truth: what lies below it has
    no end."""
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
