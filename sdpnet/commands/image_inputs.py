"""The image files that a command is given: files by name, everything below folders, and patterns such as "*.jpg"."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from torchvision.datasets.folder import IMG_EXTENSIONS

from sdpnet.pipelines.images.kinds import HEAD_BYTES, kind_of

__all__ = ["LeftOut", "Missing", "find_images"]

_MAX_DEPTH: Final = 100  # of folders in folders


@dataclass(frozen=True)
class Missing:
    """An input that gives no file, and why."""

    path: str
    reason: str


@dataclass
class LeftOut:
    """Files in folders that are no images: how many, and the first of them."""

    count: int = 0
    example: str = ""

    def add(self, path: str) -> None:
        self.example = self.example or path
        self.count += 1


def find_images(inputs: Iterable[str], left_out: LeftOut | None = None) -> Iterator[str | Missing]:
    """The path of each image, as they are found: no more than one folder's names are held at a time.

    A file that is named is taken whatever it is. Of a folder all files below it are taken, in the order of their names
    and links followed, but for hidden ones and those that neither have one of torchvision's image suffixes nor begin
    as an image; these are added to `left_out`. What does not exist and has one of "*?[" is a pattern: "**" goes through
    folders at any depth.
    """
    left_out = LeftOut() if left_out is None else left_out
    for given in inputs:
        if not given:
            yield Missing("''", "an empty name")
        elif os.path.isdir(given):
            yield from _below_folder(given, left_out)
        elif os.path.lexists(given) or not glob.has_magic(given):
            yield given
        else:
            found = sorted(path for path in glob.iglob(given, recursive=True) if not _loops(path, given))
            if not found:
                yield Missing(given, "no file has a name of this pattern")
            for path in found:
                if not os.path.isdir(path):
                    yield path
                elif "**" not in given:  # which gives what is in the folder too
                    yield from _below_folder(path, left_out)


def _loops(path: str, pattern: str) -> bool:
    """Whether a path that `glob` found goes through a folder twice, by a link to a folder above it."""
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


def _below_folder(folder: str, left_out: LeftOut) -> Iterator[str | Missing]:
    some = False
    for found in _walk(folder, (), left_out):
        some = True
        yield found
    if not some:
        yield Missing(folder, "no image is in this folder")


def _walk(folder: str, above: tuple[tuple[int, int], ...], left_out: LeftOut) -> Iterator[str | Missing]:
    """`above` are device and inode of the folders that this one lies in: a link to one of them is not followed."""
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
            yield from _walk(path, (*above, identity), left_out)
        elif name.lower().endswith(IMG_EXTENSIONS) or _begins_as_image(path):
            yield path
        else:
            left_out.add(path)


def _begins_as_image(path: str) -> bool:
    """Whether it is a file that begins as an image does; one that cannot be opened may be one."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb", buffering=0) as file:
            return kind_of(file.read(HEAD_BYTES)).is_image
    except OSError:
        return True
