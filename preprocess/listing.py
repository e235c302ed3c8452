"""A split's images in a fixed order, each readable on its own: files of a folder, or pieces of a tar archive."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Final, NamedTuple

import numpy as np

from pipelines.errors import UserError
from preprocess.location import Location

__all__ = ["IMAGE_SUFFIXES", "Entry", "Gathered", "SplitScan", "gather"]

# torchvision.datasets.folder.IMG_EXTENSIONS
IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, eq=False)
class SplitScan:
    """The images of one split, ordered by class and then by file name.

    Attributes:
        root: the split's folder or archive.
        classes: the data set's class names; `classes[label]` is also the name of the class folder, if there are any.
        labels: int32 (num_images,).
        num_ignored: entries that are no images (hidden ones of a folder are not counted).

    Memory: 12 bytes an image, 28 in an archive. The names lie in a temporary file that has no name itself.
    """

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    num_ignored: int
    _names: bytes | mmap.mmap = field(repr=False)  # all relative paths, one after the other
    _ends: np.ndarray = field(repr=False)  # int64 (num_images,): where each one ends
    _pieces: tuple[np.ndarray, np.ndarray] | None = field(repr=False)  # an archive's offsets and sizes, int64

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def relative_path(self, index: int) -> str:
        """The name of image `index` below `root`: `CLASS/FILE`, or `FILE` where there are no class folders.

        `/` separates whatever the system. Folder and archive of the same images give the same names.
        """
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        return _name(self._names, self._ends, index)

    def locate(self, index: int) -> Location:
        """Where image `index` lies."""
        relative_path = self.relative_path(index)
        if self._pieces is None:
            path = os.path.join(self.root, relative_path)
            return Location(path, path)
        offsets, sizes = self._pieces
        return Location(f"{self.root}: {relative_path}", str(self.root), int(offsets[index]), int(sizes[index]))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the classes and of each image's name, label and, in an archive, place.

        Equal fingerprints: the same list of images, wherever it lies. Says nothing about the images' contents.
        """
        digest = hashlib.sha256(json.dumps([self.classes, self.num_images, self._pieces is not None]).encode())
        for values in (self.labels, self._ends, *(self._pieces or ())):
            digest.update(values.astype("<i8").data)
        digest.update(self._names)
        return digest.hexdigest()


class Entry(NamedTuple):
    """An image that was found: its class folder ("" where there is none), file name, and place in an archive."""

    folder: str
    file: str
    offset: int = 0
    size: int = 0


@dataclass(frozen=True, eq=False)
class Gathered:
    """The images of one folder or archive, in the order in which they were found; labels are still to be decided.

    Attributes:
        root: the folder or archive.
        is_archive: whether `root` is an archive.
        folders: the class folders in the order of their first images; ("",) for images that are in none.
        groups: int32 (num_images,), index into `folders`.
        num_ignored: entries that are no images.
    """

    root: Path
    is_archive: bool
    folders: tuple[str, ...]
    groups: np.ndarray
    num_ignored: int
    _names: bytes | mmap.mmap = field(repr=False)
    _ends: np.ndarray = field(repr=False)
    _offsets: np.ndarray = field(repr=False)
    _sizes: np.ndarray = field(repr=False)

    def file_names(self) -> list[str]:
        """All file names, without folders. Raises `UserError` when one is there twice."""
        names = [_name(self._names, self._ends, index) for index in range(len(self.groups))]
        _refuse_twice(self.root, sorted(names))
        return names

    def by_folder(self, classes: Sequence[str]) -> SplitScan:
        """The split in which each image's class is its folder. Every folder must be one of `classes`."""
        known = {name: label for label, name in enumerate(classes)}
        labels = np.array([known[folder] for folder in self.folders], np.int32)[self.groups]
        return self._in_order(classes, labels, [f"{name}/" for name in classes])

    def by_labels(self, classes: Sequence[str], labels: np.ndarray) -> SplitScan:
        """The split of images without class folders. `labels`: int32 (num_images,), in the order of `file_names()`."""
        return self._in_order(classes, labels, [""] * len(classes))

    def _in_order(self, classes: Sequence[str], labels: np.ndarray, prefixes: Sequence[str]) -> SplitScan:
        order = np.argsort(labels, kind="stable")
        lengths = np.empty(len(labels), np.int64)
        starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
        with tempfile.TemporaryFile() as file:
            for start, end in pairwise([*starts.tolist(), len(labels)]):
                group = order[start:end]
                prefix = prefixes[labels[group[0]]]
                named = sorted((_name(self._names, self._ends, index), index) for index in group.tolist())
                _refuse_twice(self.root, [prefix + name for name, _ in named])
                order[start:end] = [index for _, index in named]
                encoded = [os.fsencode(prefix + name) for name, _ in named]
                file.write(b"".join(encoded))
                lengths[start:end] = [len(name) for name in encoded]
            names = _mapped(file)
        pieces = (self._offsets[order], self._sizes[order]) if self.is_archive else None
        return SplitScan(self.root, tuple(classes), labels[order], self.num_ignored, names, np.cumsum(lengths), pieces)


def gather(root: Path, entries: Iterable[Entry | None], *, is_archive: bool = False) -> Gathered:
    """Takes down all entries of a folder or archive; None stands for one that is no image."""
    folders: dict[str, int] = {}
    groups, ends, offsets, sizes = array("i"), array("q"), array("q"), array("q")
    end = num_ignored = 0
    with tempfile.TemporaryFile() as file:
        for entry in entries:
            if entry is None:
                num_ignored += 1
                continue
            end += file.write(os.fsencode(entry.file))
            ends.append(end)
            groups.append(folders.setdefault(entry.folder, len(folders)))
            if is_archive:
                offsets.append(entry.offset)
                sizes.append(entry.size)
        names = _mapped(file)
    return Gathered(
        root,
        is_archive,
        tuple(folders),
        np.array(groups, np.int32),
        num_ignored,
        names,
        *(np.array(values, np.int64) for values in (ends, offsets, sizes)),
    )


def _refuse_twice(root: Path, names: list[str]) -> None:
    """Raises `UserError` when two of these sorted names are the same, which an archive allows."""
    for name, following in pairwise(names):
        if name == following:
            raise UserError(f"{root}: {name!r} is in it twice; make the archive again with each image once")


def _mapped(file: IO[bytes]) -> bytes | mmap.mmap:
    """The file's contents; they stay when it is closed."""
    file.flush()
    if os.fstat(file.fileno()).st_size == 0:  # which mmap refuses
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _name(names: bytes | mmap.mmap, ends: np.ndarray, index: int) -> str:
    start = int(ends[index - 1]) if index else 0
    return os.fsdecode(names[start : int(ends[index])])
