"""A split whose images lie in container files, in the order of the files and of the images in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sdpnet.pipelines.shards.origin import LeftOut
from sdpnet.preprocess.sources.files.location import Location
from sdpnet.preprocess.sources.parquet.row import RowLocation

__all__ = ["Addresses", "ContainerSplit", "RowAddresses", "TarAddresses"]


class Addresses(Protocol):
    """The places of images in container files, by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image below the root of the split."""
        ...

    def locate(self, index: int) -> Location | RowLocation:
        """The location of an image."""
        ...

    def select(self, indices: np.ndarray) -> Addresses:
        """The addresses of a part of the images. `indices`: int64 (n,), ascending."""
        ...

    def identity(self) -> Iterator[Any]:
        """What the addresses consist of: values for JSON, and arrays of integers. Not the folder of the files."""
        ...


@dataclass(frozen=True, eq=False)
class TarAddresses:
    """Images in tars.

    Attributes:
        root: the folder of the tars.
        tars: the name of each tar below `root`.
        places: int32 (num_images,), indices into `tars`.
        offsets, sizes: int64 (num_images,), positions and sizes in bytes.
        names: the names of all images in their tars, one after the other.
        ends: int64 (num_images,), where each name ends in `names`.
        chosen: int64 (n,), the images of a selection; None for all.
    """

    root: Path
    tars: tuple[str, ...]
    places: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: Any = field(repr=False)  # bytes, or a map of a file
    ends: np.ndarray = field(repr=False)
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.places) if self.chosen is None else len(self.chosen)

    def _file(self, index: int) -> tuple[int, str]:
        """The number of image `index` of the selection among all images, and its name in its tar."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = index if self.chosen is None else int(self.chosen[index])
        start = int(self.ends[image - 1]) if image else 0
        return image, os.fsdecode(self.names[start : int(self.ends[image])])

    def name(self, index: int) -> str:
        image, file = self._file(index)
        return f"{self.tars[self.places[image]]}/{file}"

    def locate(self, index: int) -> Location:
        image, file = self._file(index)
        path = os.path.join(self.root, self.tars[self.places[image]])
        return Location(f"{path}: {file}", path, int(self.offsets[image]), int(self.sizes[image]))

    def select(self, indices: np.ndarray) -> TarAddresses:
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def identity(self) -> Iterator[Any]:
        yield from (self.tars, self.places, self.offsets, self.sizes, self.ends, self.names)
        if self.chosen is not None:
            yield self.chosen


@dataclass(frozen=True, eq=False)
class RowAddresses:
    """Images in rows of Parquet files.

    Attributes:
        root: the folder of the files.
        files: the name of each file below `root`.
        footers: the size of each file and the SHA-256 of its metadata.
        column: the column of the images; with `.bytes` behind it if it is a struct.
        groups: int32 (num_groups, 2), the file and the number of each row group.
        starts: int64 (num_groups + 1,), the number of rows before each row group, and of all rows.
        file_starts: int64 (num_files,), the number of rows before each file.
        sizes: int64 (num_groups,), the mean size of an image in each row group, in bytes.
        chosen: int64 (n,), the rows of a selection; None for all.
    """

    root: Path
    files: tuple[str, ...]
    footers: tuple[tuple[int, str], ...]
    column: str
    groups: np.ndarray
    starts: np.ndarray
    file_starts: np.ndarray
    sizes: np.ndarray
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.chosen is None else len(self.chosen)

    def _row(self, index: int) -> tuple[int, int, int]:
        """The row of image `index` among all rows, its row group among all groups, and its file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = index if self.chosen is None else int(self.chosen[index])
        group = int(np.searchsorted(self.starts, row, "right")) - 1
        return row, group, int(self.groups[group, 0])

    def name(self, index: int) -> str:
        row, _, file = self._row(index)
        return f"{self.files[file]}#{row - int(self.file_starts[file])}"

    def locate(self, index: int) -> RowLocation:
        row, group, file = self._row(index)
        path = os.path.join(self.root, self.files[file])
        name = f"{path}: row {row - int(self.file_starts[file])}"
        number, start, size = int(self.groups[group, 1]), int(self.starts[group]), int(self.sizes[group])
        return RowLocation(name, path, self.column, number, row - start, size)

    def select(self, indices: np.ndarray) -> RowAddresses:
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def identity(self) -> Iterator[Any]:
        yield from (self.files, self.footers, self.column, self.groups, self.starts)
        if self.chosen is not None:
            yield self.chosen


@dataclass(frozen=True, eq=False)
class ContainerSplit:
    """The images of one split in container files. See `sdpnet.preprocess.sources.listing.SplitImages`.

    Attributes:
        root: the folder of the files.
        classes: the class names of the data set, in label order.
        labels: int32 (num_images,).
        left_out: the other files, by kind.
        addresses: the place of each image.
    """

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    left_out: tuple[LeftOut, ...]
    addresses: Addresses = field(repr=False)

    @property
    def num_images(self) -> int:
        """The number of images."""
        return len(self.labels)

    def relative_path(self, index: int) -> str:
        """The name of image `index` below `root`: `TAR/FILE` or `FILE.parquet#ROW`."""
        return self.addresses.name(index)

    def locate(self, index: int) -> Location | RowLocation:
        """The location of image `index`."""
        return self.addresses.locate(index)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the classes, the labels and the addresses of the images, but not of their contents."""
        digest = hashlib.sha256(json.dumps([type(self.addresses).__name__, self.classes, self.num_images]).encode())
        digest.update(self.labels.astype("<i8").data)
        for value in self.addresses.identity():
            if isinstance(value, np.ndarray):
                digest.update(np.ascontiguousarray(value, "<i8").data)
            elif isinstance(value, (str, tuple)):
                digest.update(json.dumps(value).encode())
            else:
                digest.update(value)
        return digest.hexdigest()

    def select(self, indices: np.ndarray, left_out: tuple[LeftOut, ...] = ()) -> ContainerSplit:
        """Returns a split with a part of the images. `indices`: int64 (n,), ascending."""
        return replace(self, labels=self.labels[indices], left_out=left_out, addresses=self.addresses.select(indices))
