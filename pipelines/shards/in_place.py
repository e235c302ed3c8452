"""Reads a split whose images lie elsewhere, as they are: in files of their own, or in tars.

    SPLIT.index (`sdpnet.pipelines.shards.index_file`) -> files with one image: opened and read for each image
                                                       -> tars and other containers: mapped once

A container must still have the size and the modification time of the index.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.files.regular import NotRegularError
from sdpnet.pipelines.native.decoder import FILE_DTYPE
from sdpnet.pipelines.shards.beton import MODE_JPEG
from sdpnet.pipelines.shards.file import MappedFile, open_with_room
from sdpnet.pipelines.shards.index_file import INDEX_AGAIN, MAX_NAME, Index, difference
from sdpnet.pipelines.shards.places import Places

__all__ = ["InPlaceReader"]

# Each mapped container takes a descriptor and one of the 4,096 mappings that the native library guards. The images of
# further ones are read like files.
_MAX_MAPPED: Final = 3_000


class InPlaceReader:
    """Reads the samples of an indexed split in any order.

    See `sdpnet.pipelines.shards.layout.ShardReader`. Files with one image are opened when they are read, so a missing
    or changed one is noticed then. Containers of several images are opened and mapped here.

    Attributes:
        index: the validated index.
    """

    def __init__(self, path: str | Path, size: int | None = None, file: MappedFile | None = None) -> None:
        """Opens and validates an index, and opens the containers of several images.

        Args:
            path: the index file.
            size: its expected number of bytes, if known.
            file: the index file, if it is open already.

        Raises:
            ShardError: the index is invalid, or one of these containers is missing or has changed.
        """
        self.index = index = Index(file or MappedFile(path, size))
        samples = index.samples
        self.path = Path(path)
        self.num_samples = len(samples)
        self.labels = samples["label"].astype(np.int64)
        self.sizes = np.stack([samples["height"], samples["width"]], axis=1).astype(np.int32)
        self.modes = np.full(len(samples), MODE_JPEG, np.uint8)
        self.nbytes = samples["size"].astype(np.int64)
        self._mapped = self._with_several_images()
        self._files = [self._map(container) for container in self._mapped.tolist()]
        self._bases = np.array([mapped.data.ctypes.data for mapped in self._files], np.uint64)
        self._lengths = np.array([mapped.size for mapped in self._files], np.uint64)

    def _with_several_images(self) -> np.ndarray:
        """The containers that are mapped: all but those that are an image, from the first byte to the last."""
        samples, containers = self.index.samples, self.index.containers
        is_image = np.zeros(len(containers), bool)
        whole = (samples["offset"] == 0) & (self.nbytes == containers["size"][samples["container"]])
        is_image[samples["container"][whole]] = True
        is_image &= np.bincount(samples["container"], minlength=len(containers)) == 1
        return np.flatnonzero(~is_image)[:_MAX_MAPPED].astype(np.uint32)

    def _map(self, container: int) -> MappedFile:
        record, path = self.index.containers[container], self.index.path(container)
        try:
            mapped = MappedFile(path)
        except ShardError:
            if not os.path.lexists(path):
                raise _refusal(path, "is not there any more") from None
            raise
        if how := difference(os.fstat(mapped.descriptor), int(record["size"]), int(record["mtime_ns"])):
            raise _refusal(path, how)
        _ = mapped.data  # mapped now, so that it is the file that was checked
        return mapped

    def _slots(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The index into `_mapped` for each of these samples, and whether its container is mapped."""
        containers = self.index.samples["container"][sample_ids]
        if not len(self._mapped):
            return np.zeros(len(containers), np.int64), np.zeros(len(containers), bool)
        slots = np.minimum(np.searchsorted(self._mapped, containers), len(self._mapped) - 1)
        return slots, self._mapped[slots] == containers

    def encoded(self, sample_id: int) -> np.ndarray:
        """The JPEG file of one sample, read-only uint8 (n,).

        Raises `ShardError` if it lies in a file that is missing or was changed since it was indexed.
        """
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(sample_id)
        with self._index_in_use():
            record = self.index.samples[sample_id].copy()
            (slot,), (is_mapped,) = self._slots(np.array([sample_id]))
            if is_mapped:
                return self._files[slot].view(int(record["offset"]), int(self.nbytes[sample_id]))
            return self._read(int(record["container"]), int(record["offset"]), int(self.nbytes[sample_id]))

    @contextmanager
    def _index_in_use(self) -> Iterator[None]:
        """A context in which a number of the mapped index that leads nowhere is the error of a changed index."""
        try:
            yield
        except IndexError:
            self.index.file.check()
            raise

    def _read(self, container: int, offset: int, size: int) -> np.ndarray:
        path, record = self.index.path(container), self.index.containers[container]
        expected = int(record["size"]), int(record["mtime_ns"])
        content = bytearray()
        try:
            descriptor = open_with_room(path)
            try:
                how = difference(os.fstat(descriptor), *expected)
                while not how and len(content) < size:
                    piece = os.pread(descriptor, size - len(content), offset + len(content))
                    if not piece:
                        break
                    content += piece
                how = how or difference(os.fstat(descriptor), *expected)
            finally:
                os.close(descriptor)
        except NotRegularError as error:
            how = f"is {error.kind} now, not a file of data"
        except (FileNotFoundError, NotADirectoryError):
            how = "is not there any more"
        except OSError as error:
            how = f"cannot be read ({error.strerror})"
        if how or len(content) < size:
            self.index.file.check()  # a changed index leads to wrong files
            raise _refusal(path, how or "has become shorter while it was read")
        return np.frombuffer(bytes(content), np.uint8)

    def places(self, sample_ids: np.ndarray) -> Places:
        """The places of samples' images, for the native decoder.

        The index is mapped, and somebody may write to it at any time. What the decoder gets is therefore copied first,
        and checked afterwards where it could lead to memory that is not ours.
        """
        with self._index_in_use():
            samples, nbytes = self.index.samples[sample_ids], self.nbytes[sample_ids]
            slots, is_mapped = self._slots(sample_ids)
            offsets = samples["offset"].astype(np.uint64)
            addresses = np.zeros(len(samples), np.uint64)
            if is_mapped.any():
                slots, starts = slots[is_mapped], offsets[is_mapped]
                room = self._lengths[slots] - nbytes[is_mapped].astype(np.uint64)
                if (starts > room).any():
                    raise IndexError("an image outside of its container")
                addresses[is_mapped] = self._bases[slots] + starts
            if is_mapped.all():
                return Places(addresses, nbytes)
            return Places(addresses, nbytes, self._stored(samples, offsets, is_mapped))

    def _stored(self, samples: np.ndarray, offsets: np.ndarray, is_mapped: np.ndarray) -> np.ndarray:
        """The images that are read from files: `FILE_DTYPE` (n,), in one block of memory with the names."""
        index = self.index
        containers = index.containers[samples["container"]]
        folders = index.folder_starts[containers["folder"]] + np.uint64(index.folders.ctypes.data)
        following = index.containers["name_start"][np.minimum(samples["container"] + 1, len(index.containers) - 1)]
        last = samples["container"] + 1 == len(index.containers)
        size = np.uint64(len(index.names))
        starts = np.minimum(containers["name_start"], size)
        ends = np.clip(np.where(last, size, following), starts, np.minimum(starts + np.uint64(MAX_NAME + 1), size))
        lengths = (ends - starts).astype(np.int64) + 1  # each name gets a zero of its own at its end
        begins = np.cumsum(lengths) - lengths
        head = len(samples) * FILE_DTYPE.itemsize
        block = np.zeros(head + int(lengths.sum()), np.uint8)
        wanted = np.repeat(starts.astype(np.int64) - begins, lengths) + np.arange(len(block) - head)
        block[head:] = index.names[np.minimum(wanted, len(index.names) - 1)]
        block[head + begins + lengths - 1] = 0
        files: np.ndarray = block[:head].view(FILE_DTYPE)
        files["folder"] = np.where(is_mapped, np.uint64(0), folders)
        files["name"] = begins.astype(np.uint64) + np.uint64(block.ctypes.data + head)
        files["offset"], files["size"], files["mtime_ns"] = offsets, containers["size"], containers["mtime_ns"]
        return files

    def file_of(self, sample_id: int) -> str:
        """The path of the file that holds a sample's image."""
        with self._index_in_use():
            return self.index.path(int(self.index.samples["container"][sample_id]))

    def check(self, sample_ids: np.ndarray) -> None:
        """Raises `ShardError` if the index or a mapped container of these samples was changed since it was opened.

        Files with one image are not looked at: each is checked whenever it is read.
        """
        self.index.file.check()
        if len(self._mapped):
            slots, is_mapped = self._slots(sample_ids)
            for slot in np.unique(slots[is_mapped]).tolist():
                self._files[slot].check()

    def __reduce__(self) -> tuple[Any, ...]:
        return InPlaceReader, (self.path, None, self.index.file)


def _refusal(path: str, how: str) -> ShardError:
    return ShardError(f"{path}: {how}; {INDEX_AGAIN}")
