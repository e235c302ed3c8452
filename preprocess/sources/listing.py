"""Lists the images of a split in a fixed order. Images are files in a folder, or parts of a tar archive.

The order is that of torchvision's ImageFolder: by class, then by the folder below the class folder, then by name.
"""

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
from typing import IO, NamedTuple, Protocol

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.origin import LeftOut
from sdpnet.preprocess.sources.files.file_kinds import Skipped, Tally
from sdpnet.preprocess.sources.files.location import Location
from sdpnet.preprocess.sources.parquet.row import ImageLocation

__all__ = ["Entry", "Gathered", "SplitImages", "SplitScan", "gather", "mapped", "num_folders_above"]


class SplitImages(Protocol):
    """The images of one split: `SplitScan`, or `sdpnet.preprocess.sources.containers.split.ContainerSplit`."""

    @property
    def root(self) -> Path:
        """The folder or archive of the split."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names of the data set, in label order."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """int32 (num_images,)."""
        ...

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The other files, by kind."""
        ...

    @property
    def num_images(self) -> int:
        """The number of images."""
        ...

    def relative_path(self, index: int) -> str:
        """The name of image `index` below `root`."""
        ...

    def locate(self, index: int) -> ImageLocation:
        """The location of image `index`."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the list of images; equal for two listings of the same images."""
        ...

    def select(self, indices: np.ndarray, left_out: tuple[LeftOut, ...] = ()) -> SplitImages:
        """Returns a split with a part of the images. `indices`: int64 (n,), ascending."""
        ...


@dataclass(frozen=True, eq=False)
class SplitScan:
    """The images of one split, ordered by class, then by the folder below the class folder, then by file name.

    An image takes 12 bytes of memory, or 28 in an archive. The names are not in memory but in an anonymous temporary
    file.

    Attributes:
        root: the folder or archive of the split.
        classes: the class names of the data set. `classes[label]` is also the name of the class folder, if any.
        labels: int32 (num_images,).
        left_out: the other files below `root`, by kind.
    """

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    left_out: tuple[LeftOut, ...]
    _names: bytes | mmap.mmap = field(repr=False)  # all relative paths, one after the other
    _ends: np.ndarray = field(repr=False)  # int64 (num_images,): where each path ends in _names
    _pieces: tuple[np.ndarray, np.ndarray] | None = field(repr=False)  # offsets and sizes in an archive, int64

    @property
    def num_images(self) -> int:
        """The number of images."""
        return len(self.labels)

    def relative_path(self, index: int) -> str:
        """The name of image `index` below `root`: `CLASS/.../FILE`, or `FILE` if there are no class folders.

        The separator is `/` on every system. A folder and an archive of the same images give the same names.
        """
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        return _name(self._names, self._ends, index)

    def locate(self, index: int) -> Location:
        """The location of image `index`."""
        relative_path = self.relative_path(index)
        if self._pieces is None:
            path = os.path.join(self.root, relative_path)
            return Location(path, path)
        offsets, sizes = self._pieces
        return Location(f"{self.root}: {relative_path}", str(self.root), int(offsets[index]), int(sizes[index]))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the classes and of the name, the label and, in an archive, the position of each image.

        Equal fingerprints mean the same list of images, in any place. They do not cover the contents of the images.
        """
        digest = hashlib.sha256(json.dumps([self.classes, self.num_images, self._pieces is not None]).encode())
        for values in (self.labels, self._ends, *(self._pieces or ())):
            digest.update(values.astype("<i8").data)
        digest.update(self._names)
        return digest.hexdigest()

    def select(self, indices: np.ndarray, left_out: tuple[LeftOut, ...] = ()) -> SplitScan:
        """Returns a split with a part of the images. `indices`: int64 (n,), ascending."""
        lengths = np.empty(len(indices), np.int64)
        with tempfile.TemporaryFile() as file:
            for place, index in enumerate(indices.tolist()):
                lengths[place] = file.write(_piece(self._names, self._ends, index))
            names = mapped(file)
        pieces = None if self._pieces is None else (self._pieces[0][indices], self._pieces[1][indices])
        labels = self.labels[indices]
        return SplitScan(self.root, self.classes, labels, left_out, names, np.cumsum(lengths), pieces)


class Entry(NamedTuple):
    """An image: its folder ("" for the root), its file name, and its position in an archive, in bytes."""

    folder: str
    file: str
    offset: int = 0
    size: int = 0


@dataclass(frozen=True, eq=False)
class Gathered:
    """The images of one folder or archive, in the order in which they were found, without labels.

    Attributes:
        root: the folder or archive.
        is_archive: whether `root` is an archive.
        folders: the folders with images, in the order of their first images; "" is the root itself.
        groups: int32 (num_images,), indices into `folders`.
        left_out: the other files, by kind.
    """

    root: Path
    is_archive: bool
    folders: tuple[str, ...]
    groups: np.ndarray
    left_out: tuple[LeftOut, ...]
    _names: bytes | mmap.mmap = field(repr=False)
    _ends: np.ndarray = field(repr=False)
    _offsets: np.ndarray = field(repr=False)
    _sizes: np.ndarray = field(repr=False)

    @property
    def places(self) -> list[tuple[str, str]]:
        """The class folder of each of `folders`, and the path below it ("" for the class folder itself).

        The class folder is the first one below the root, or, in an archive, below the folders that all images share.
        """
        parts = [tuple(folder.split("/")) if folder else () for folder in self.folders]
        above = num_folders_above(parts) if self.is_archive else 0
        return [("".join(part[above : above + 1]), "/".join(part[above + 1 :])) for part in parts]

    def file_names(self) -> list[str]:
        """All file names, without folders. Raises `UserError` if a name occurs twice."""
        names = [_name(self._names, self._ends, index) for index in range(len(self.groups))]
        _refuse_duplicates(self.root, sorted(names))
        return names

    def by_folder(self, classes: Sequence[str]) -> SplitScan:
        """Returns the split in which the class of an image is its class folder.

        Args:
            classes: class names in label order; they must include all class folders.
        """
        known = {name: label for label, name in enumerate(classes)}
        labels = np.array([known[folder] for folder, _ in self.places], np.int32)[self.groups]
        below = [rest for _, rest in self.places]
        return self._in_order(classes, labels, [f"{name}/" for name in classes], below)

    def by_labels(self, classes: Sequence[str], labels: np.ndarray) -> SplitScan:
        """Returns the split of images without class folders.

        Args:
            classes: class names in label order.
            labels: int32 (num_images,), in the order of `file_names()`.
        """
        below = ["" if self.is_archive else folder for folder in self.folders]
        return self._in_order(classes, labels, [""] * len(classes), below)

    def _in_order(
        self, classes: Sequence[str], labels: np.ndarray, prefixes: Sequence[str], below: Sequence[str]
    ) -> SplitScan:
        """Returns the sorted split. The relative path of an image is PREFIX[FOLDER/]NAME.

        Args:
            classes: class names in label order.
            labels: int32 (num_images,).
            prefixes: the prefix for each class.
            below: the path below the class folder for each of `folders`.
        """
        order = np.argsort(labels, kind="stable")
        lengths = np.empty(len(labels), np.int64)
        starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
        with tempfile.TemporaryFile() as file:
            for start, end in pairwise([*starts.tolist(), len(labels)]):
                group = order[start:end]
                prefix = prefixes[labels[group[0]]]
                named = sorted(
                    (below[self.groups[index]], _name(self._names, self._ends, index), index)
                    for index in group.tolist()
                )
                paths = [prefix + (f"{folder}/{name}" if folder else name) for folder, name, _ in named]
                _refuse_duplicates(self.root, paths)
                order[start:end] = [index for _, _, index in named]
                encoded = [os.fsencode(path) for path in paths]
                file.write(b"".join(encoded))
                lengths[start:end] = [len(name) for name in encoded]
            names = mapped(file)
        pieces = (self._offsets[order], self._sizes[order]) if self.is_archive else None
        return SplitScan(self.root, tuple(classes), labels[order], self.left_out, names, np.cumsum(lengths), pieces)


def num_folders_above(folders: Iterable[Sequence[str]]) -> int:
    """The number of folders above the class folders of an archive.

    These are the folders that all images share, without the last one if the images of some folder lie directly in it:
    that one is the class folder.

    Args:
        folders: the parts of the path of each folder with images.
    """
    parts = list(folders)
    shared = 0
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    return max(0, min(shared, min(map(len, parts), default=0) - 1))


def gather(root: Path, entries: Iterable[Entry | Skipped], *, is_archive: bool = False) -> Gathered:
    """Collects all entries of a folder or archive."""
    folders: dict[str, int] = {}
    groups, ends, offsets, sizes = array("i"), array("q"), array("q"), array("q")
    tally = Tally()
    end = 0
    with tempfile.TemporaryFile() as file:
        for entry in entries:
            if isinstance(entry, Skipped):
                tally.add(entry)
                continue
            end += file.write(os.fsencode(entry.file))
            ends.append(end)
            groups.append(folders.setdefault(entry.folder, len(folders)))
            if is_archive:
                offsets.append(entry.offset)
                sizes.append(entry.size)
        names = mapped(file)
    return Gathered(
        root,
        is_archive,
        tuple(folders),
        np.array(groups, np.int32),
        tally.result(),
        names,
        *(np.array(values, np.int64) for values in (ends, offsets, sizes)),
    )


def _refuse_duplicates(root: Path, names: list[str]) -> None:
    """Raises `UserError` if two of these sorted names are the same, which is possible in an archive."""
    for name, following in pairwise(names):
        if name == following:
            raise UserError(f"{root}: {name!r} is in it twice; make the archive again with each image once")


def mapped(file: IO[bytes]) -> bytes | mmap.mmap:
    """The contents of a file, mapped into memory. They stay available after the file is closed."""
    file.flush()
    if os.fstat(file.fileno()).st_size == 0:  # mmap refuses empty files
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _name(names: bytes | mmap.mmap, ends: np.ndarray, index: int) -> str:
    return os.fsdecode(_piece(names, ends, index))


def _piece(names: bytes | mmap.mmap, ends: np.ndarray, index: int) -> bytes:
    start = int(ends[index - 1]) if index else 0
    return names[start : int(ends[index])]
