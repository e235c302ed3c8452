"""The files that hold the images of a split, as the tables of an index."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from sdpnet.pipelines.shards.index_file import CONTAINER_DTYPE, FOLDER_DTYPE

__all__ = ["Containers"]


class Containers:
    """Collects containers in the order of their first image: folder, name, size and modification time of each.

    A container takes about 60 bytes of memory and no Python object.

    Args:
        out: the folder of the index. Paths of folders are relative to it if both lie below a common folder other than
            the root of the file system, else absolute.
    """

    def __init__(self, out: Path) -> None:
        self._out = os.path.realpath(out)
        self._folders: dict[str, int] = {}
        self._names = bytearray()
        self._starts: list[np.ndarray] = []
        self._new_starts: list[int] = []
        self._new_folders: list[int] = []
        self._folder_numbers: list[np.ndarray] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, path: str) -> int:
        """Adds a file and returns its number. Its size and modification time come later."""
        folder, name = os.path.split(path)
        self._new_folders.append(self._folders.setdefault(folder, len(self._folders)))
        self._new_starts.append(len(self._names))
        self._names += os.fsencode(name) + b"\0"
        if len(self._new_starts) == 1 << 16:
            self._pack()
        self._count += 1
        return self._count - 1

    def tables(
        self, sizes: np.ndarray, mtimes_ns: np.ndarray, kept: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, bytes]:
        """The folder table, the container table and the names, of the containers for which `kept` is True.

        Args:
            sizes, mtimes_ns: int64 (len(self),).
            kept: bool (len(self),).
        """
        self._pack()
        starts = np.concatenate([np.zeros(0, np.int64), *self._starts])
        numbers = np.concatenate([np.zeros(0, np.uint32), *self._folder_numbers])
        names = np.frombuffer(bytes(self._names), np.uint8)
        lengths = np.diff(starts, append=len(names))
        if not kept.all():
            names = names[np.repeat(kept, lengths)]
            numbers, lengths, sizes, mtimes_ns = numbers[kept], lengths[kept], sizes[kept], mtimes_ns[kept]
        used, numbers = np.unique(numbers, return_inverse=True)
        folders = list(self._folders)
        paths = [self._stored_path(folders[number]) + b"\0" for number in used.tolist()]
        ends = np.cumsum([len(path) for path in paths], dtype=np.uint64)
        folder_table = np.zeros(len(paths), FOLDER_DTYPE)
        folder_table[1:] = ends[:-1]
        containers = np.zeros(len(numbers), CONTAINER_DTYPE)
        containers["size"], containers["mtime_ns"], containers["folder"] = sizes, mtimes_ns, numbers
        first = int(ends[-1]) if len(ends) else 0
        containers["name_start"] = first + np.cumsum(lengths) - lengths
        return folder_table, containers, b"".join(paths) + names.tobytes()

    def _stored_path(self, folder: str) -> bytes:
        real = os.path.realpath(folder)
        if real == self._out:
            return b""
        if os.path.commonpath([real, self._out]) != os.sep:
            return os.fsencode(os.path.relpath(real, self._out))
        return os.fsencode(real)

    def _pack(self) -> None:
        self._starts.append(np.array(self._new_starts, np.int64))
        self._folder_numbers.append(np.array(self._new_folders, np.uint32))
        self._new_starts, self._new_folders = [], []
