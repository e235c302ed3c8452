"""Writes `.beton` files such that a killed run can be continued.

The format is FFCV's, version 2; see `sdpnet.pipelines.shards.beton`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import open_new, write_all
from sdpnet.pipelines.shards.beton import (
    ALLOCATION_DTYPE,
    BETON_VERSION,
    CRC32_DTYPE,
    FIELD_DTYPE,
    HEADER_DTYPE,
    IMAGE_FIELD_TYPE,
    LABEL_FIELD_TYPE,
    METADATA_DTYPE,
    MODE_JPEG,
)
from sdpnet.pipelines.shards.layout import sha256_of
from sdpnet.pipelines.shards.manifest import ShardFile
from sdpnet.preprocess.conversion.writers.records import Records, require_bytes
from sdpnet.preprocess.workers.result import ImageState

__all__ = ["PAGE_SIZE", "BetonWriter"]

PAGE_SIZE: Final = 1 << 23  # FFCV's default
METADATA_START: Final = HEADER_DTYPE.itemsize + 2 * FIELD_DTYPE.itemsize


class BetonWriter:
    """Writes one split as `SPLIT.beton`, with `SPLIT.crc32` beside it. The same samples give the same bytes.

        with BetonWriter(directory, "train", num_images) as writer:
            writer.resume(sizes of the images that are in the file already)
            writer.add(image, label)
            files = writer.finish(records)

    The position of an image depends only on the sizes of the images before it, so that a later run needs nothing but
    these sizes to continue. The header is zero until the very end of `finish`, so that no reader accepts an unfinished
    file; FFCV's own writer leaves unfinished files that look valid. Memory does not grow with the number of images.

    The SHA-256 is computed while the images are written, because reading a large file again for it takes long: 0.42 of
    3.0 s for 480 MB that were still in memory. It therefore starts at the first image, and the header and the tables
    before the images, which are written last, are added at the end (`ShardFile.hashed_from`).

    Args:
        directory: the folder of the files.
        split: the name of the files.
        num_images: the number of samples for which the metadata has room, at least 1. Fewer samples may be added.
        page_size: in bytes, a power of two. No image crosses the end of a page.
    """

    format = "beton"

    def __init__(self, directory: Path, split: str, num_images: int, page_size: int = PAGE_SIZE) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}, must be at least 1")
        if not 0 < page_size < 1 << 32 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}, must be a power of two below 2**32")
        self.path = directory / f"{split}.beton"
        self.page_size = page_size
        self._data_start = -(-(METADATA_START + num_images * METADATA_DTYPE.itemsize) // page_size) * page_size
        self._end = self._data_start  # the end of the last image
        self._digest = hashlib.sha256()  # of the bytes from the first image on
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def resume(self, sizes: Iterable[int]) -> None:
        """Keeps the images with these sizes, which an earlier run has written, and removes everything after them.

        Raises `UserError` if the file is too short for them.
        """
        for size in sizes:
            self._end = self._position(self._end, size) + size
        if self._end > self._data_start:
            require_bytes(self._file, self._end, self.path)
        os.ftruncate(self._file, self._end)
        write_all(self._file, bytes(METADATA_START), 0)
        self._digest_file(self._data_start, self._end)

    def add(self, image: bytes | memoryview, label: int) -> None:
        """Appends a sample. Raises `UserError` if the image is larger than a page."""
        if len(image) > self.page_size:
            raise UserError(
                f"{len(image):,} bytes once encoded, but a page of a .beton file holds {self.page_size:,}; "
                "convert with a smaller --max-side or --quality"
            )
        start = self._position(self._end, len(image))
        write_all(self._file, image, start)
        if start > self._end:
            self._digest.update(bytes(start - self._end))
        self._digest.update(image)
        self._end = start + len(image)

    def sync(self) -> None:
        """Waits until everything that was added is on the disk. It may be called from another thread."""
        os.fsync(self._file)

    def finish(self, records: Records) -> tuple[ShardFile, ...]:
        """Writes the tables, the file of checksums and, last, the header. Returns the files for the manifest.

        Args:
            records: the records of all images of the split, in order. Bad images have no sample.
        """
        table_start = -(-self._end // self.page_size) * self.page_size
        os.ftruncate(self._file, table_start)
        self._digest.update(bytes(table_start - self._end))
        fields = np.zeros(2, FIELD_DTYPE)
        fields["type_id"] = IMAGE_FIELD_TYPE, LABEL_FIELD_TYPE
        fields["name"][0, :5] = np.frombuffer(b"image", np.uint8)
        fields["name"][1, :5] = np.frombuffer(b"label", np.uint8)
        write_all(self._file, fields.tobytes(), HEADER_DTYPE.itemsize)
        crc32_path = self.path.with_suffix(".crc32")
        num_samples, end = 0, self._data_start
        with open_new(crc32_path) as checksums:
            for piece in records.pieces():
                piece = piece[piece["state"] != ImageState.BAD]
                metadata = np.zeros(len(piece), METADATA_DTYPE)
                metadata["mode"] = MODE_JPEG
                for name in ("width", "height", "label"):
                    metadata[name] = piece[name]
                for index, size in enumerate(piece["size"].tolist()):
                    start = self._position(end, size)
                    metadata["data_ptr"][index] = start
                    end = start + size
                table = np.zeros(len(piece), ALLOCATION_DTYPE)
                table["sample_id"] = np.arange(num_samples, num_samples + len(piece))
                table["ptr"] = metadata["data_ptr"]
                table["size"] = piece["size"]
                write_all(self._file, metadata.tobytes(), METADATA_START + num_samples * METADATA_DTYPE.itemsize)
                content = table.tobytes()
                write_all(self._file, content, table_start + num_samples * ALLOCATION_DTYPE.itemsize)
                self._digest.update(content)
                content = piece["crc32"].astype(CRC32_DTYPE).tobytes()
                write_all(checksums.fileno(), content, num_samples * CRC32_DTYPE.itemsize)
                num_samples += len(piece)
            os.fsync(checksums.fileno())
        header = np.zeros(1, HEADER_DTYPE)
        header[0] = (BETON_VERSION, 2, self.page_size, num_samples, table_start)
        self._digest.update(header.tobytes())
        self._digest_file(HEADER_DTYPE.itemsize, self._data_start)
        os.fsync(self._file)
        write_all(self._file, header.tobytes(), 0)
        os.fsync(self._file)
        size = table_start + num_samples * ALLOCATION_DTYPE.itemsize
        sidecars = {crc32_path.name: sha256_of(crc32_path)}
        sha256 = self._digest.hexdigest()
        return (ShardFile(self.path.name, num_samples, size, sha256, sidecars, self._data_start),)

    def _digest_file(self, first: int, end: int) -> None:
        """Adds the bytes from `first` to `end` of the file to the SHA-256."""
        while first < end and (chunk := os.pread(self._file, min(end - first, 1 << 23), first)):
            self._digest.update(chunk)
            first += len(chunk)

    def _position(self, end: int, size: int) -> int:
        """The position of an image after one that ends at `end`: there, or at the next page if it does not fit."""
        page_end = -(-(end + 1) // self.page_size) * self.page_size
        return end if end + size <= page_end else page_end
