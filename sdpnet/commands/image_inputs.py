"""The image files for a command, given as names of files, as folders, and as patterns such as "*.jpg"."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from torchvision.datasets.folder import IMG_EXTENSIONS

from sdpnet.pipelines.images.kinds import HEAD_BYTES, kind_of

__all__ = ["Missing", "SkippedFiles", "find_images"]

_MAX_DEPTH: Final = 100  # levels of folders in folders


@dataclass(frozen=True)
class Missing:
    """An input without any file, and the reason."""

    path: str
    reason: str


@dataclass
class SkippedFiles:
    """The number of files in folders that are not images, and the path of the first one."""

    count: int = 0
    example: str = ""

    def add(self, path: str) -> None:
        self.example = self.example or path
        self.count += 1


def find_images(inputs: Iterable[str], skipped: SkippedFiles | None = None) -> Iterator[str | Missing]:
    """Yields the path of each image as it is found, so that only the names in one folder at a time are in memory.

    Args:
        inputs: files, folders and patterns. A file that is given by its name is always yielded. Of a folder, all images
            below it are yielded in the order of their names, following links but skipping hidden files. A file counts
            as an image if it has one of torchvision's image suffixes or begins like an image. A text that is not the
            name of a file and contains one of "*?[" is a pattern, in which "**" matches folders at any depth.
        skipped: gets the files in folders that are not images.

    Yields:
        A path, or `Missing` for an input without any file.
    """
    skipped = SkippedFiles() if skipped is None else skipped
    for given in inputs:
        if not given:
            yield Missing("''", "an empty name")
        elif os.path.isdir(given):
            yield from _below_folder(given, skipped)
        elif os.path.lexists(given) or not glob.has_magic(given):
            yield given
        else:
            found = sorted(path for path in glob.iglob(given, recursive=True) if not _loops(path, given))
            if not found:
                yield Missing(given, "no file has a name of this pattern")
            for path in found:
                if not os.path.isdir(path):
                    yield path
                elif "**" not in given:  # "**" also finds the files in the folder
                    yield from _below_folder(path, skipped)


def _loops(path: str, pattern: str) -> bool:
    """Whether a path from `glob` passes through one folder twice, because of a link to a folder above it."""
    if "**" not in pattern:
        return False
    first = next(number for number, part in enumerate(pattern.split(os.sep)) if glob.has_magic(part))
    parts = path.split(os.sep)[:-1]
    through = [_identity(os.sep.join(parts[:end]) or os.sep) for end in range(max(1, first), len(parts) + 1)]
    return len(set(through)) < len(through)


@lru_cache(4096)
def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _below_folder(folder: str, skipped: SkippedFiles) -> Iterator[str | Missing]:
    found_any = False
    for found in _walk(folder, (), skipped):
        found_any = True
        yield found
    if not found_any:
        yield Missing(folder, "no image is in this folder")


def _walk(folder: str, above: tuple[tuple[int, int], ...], skipped: SkippedFiles) -> Iterator[str | Missing]:
    """Yields the images below `folder`.

    `above` has device and inode of the folders that contain this one; a link to one of them is not followed.
    """
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        yield Missing(folder, f"cannot be read ({error.strerror})")
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above or len(above) > _MAX_DEPTH:
        return
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path, (*above, identity), skipped)
        elif name.lower().endswith(IMG_EXTENSIONS) or _begins_as_image(path):
            yield path
        else:
            skipped.add(path)


def _begins_as_image(path: str) -> bool:
    """Whether it is a file that begins like an image. A file that cannot be opened counts as one, so it is reported."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb", buffering=0) as file:
            return kind_of(file.read(HEAD_BYTES)).is_image
    except OSError:
        return True
