"""Writes `.beton` files (FFCV's format, version 2; see `pipelines.layout`) page by page."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np

from pipelines.errors import UserError
from pipelines.layout import (
    ALLOCATION_DTYPE,
    BETON_VERSION,
    CRC32_DTYPE,
    FIELD_DTYPE,
    HEADER_DTYPE,
    IMAGE_FIELD_TYPE,
    LABEL_FIELD_TYPE,
    METADATA_DTYPE,
    MODE_JPEG,
    ShardFile,
)
from pipelines.publish import partial_path, publish, publish_bytes
from preprocess.encode import EncodedImage

__all__ = ["PAGE_SIZE", "BetonWriter"]

PAGE_SIZE: Final = 1 << 23  # FFCV's default
METADATA_START: Final = HEADER_DTYPE.itemsize + 2 * FIELD_DTYPE.itemsize


class BetonWriter:
    """Writes one `.beton` file of JPEGs and labels. The same samples give the same bytes.

        with BetonWriter(path, num_samples) as writer:
            for image, label in samples:
                writer.add(image, label)
            shard = writer.finish()
            writer.publish()

    Until `publish`, the file has the name `partial_path(path)` and a header of zeros, which no reader
    accepts; `publish` completes the header and then renames it. Leaving the block without `publish` removes
    the file. Memory: one page and 36 bytes a sample.

    Args:
        path: the final name.
        num_samples: how many times `add` will be called, at least 1; `skip` takes one off.
        page_size: bytes, a power of two; no image crosses a page's end.
    """

    def __init__(self, path: str | os.PathLike[str], num_samples: int, page_size: int = PAGE_SIZE) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, must be at least 1")
        if not 0 < page_size < 1 << 32 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}, must be a power of two below 2**32")
        self.path = Path(path)
        self.page_size = page_size
        self._metadata: np.ndarray = np.zeros(num_samples, METADATA_DTYPE)
        self._sizes: np.ndarray = np.zeros(num_samples, np.uint64)
        self._checksums: np.ndarray = np.zeros(num_samples, CRC32_DTYPE)
        self._num_added = 0
        metadata_end = METADATA_START + self._metadata.nbytes
        self._page_start = -(-metadata_end // page_size) * page_size
        self._page = bytearray()
        self._header: bytes | None = None
        self._published = False
        self._file = partial_path(self.path).open("w+b", buffering=0)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._published:
            partial_path(self.path).unlink(missing_ok=True)

    @property
    def crc32_path(self) -> Path:
        """Where the samples' checksums go: beside the file, with the suffix `.crc32`."""
        return self.path.with_suffix(".crc32")

    def add(self, image: EncodedImage, label: int, name: str | None = None) -> None:
        """Appends a sample. `name` is what an error calls it.

        Raises `UserError` when the image is larger than a page.
        """
        index, size = self._num_added, len(image.data)
        if self._header is not None or index == len(self._metadata):
            raise ValueError(f"more than the {len(self._metadata)} samples that were announced")
        if size > self.page_size:
            raise UserError(
                f"{name or f'sample {index}'}: {size:,} bytes once encoded, but a page of a .beton file "
                f"holds {self.page_size:,}; convert with a smaller --max-side or --quality"
            )
        if len(self._page) + size > self.page_size:
            self._flush_page()
        pointer = self._page_start + len(self._page)
        self._page += image.data
        self._metadata[index] = (MODE_JPEG, image.width, image.height, pointer, label)
        self._sizes[index] = size
        self._checksums[index] = zlib.crc32(image.data)
        self._num_added += 1

    def skip(self) -> None:
        """One sample fewer than announced will be added; its place before the data stays empty."""
        if self._num_added == len(self._metadata):
            raise ValueError("nothing left to skip")
        self._metadata, self._sizes, self._checksums = self._metadata[:-1], self._sizes[:-1], self._checksums[:-1]

    def finish(self) -> ShardFile:
        """Writes the last page and the tables, waits for the disk, and returns what the manifest says of it.

        The header stays unwritten. Reads the whole file once, for its checksum.
        """
        if self._num_added != len(self._metadata):
            raise ValueError(f"{self._num_added} samples, but {len(self._metadata)} were announced")
        self._flush_page()
        table = np.zeros(len(self._metadata), ALLOCATION_DTYPE)
        table["sample_id"] = np.arange(len(table))
        table["ptr"] = self._metadata["data_ptr"]
        table["size"] = self._sizes
        fields = np.zeros(2, FIELD_DTYPE)
        fields["type_id"] = IMAGE_FIELD_TYPE, LABEL_FIELD_TYPE
        for field, name in zip(fields, (b"image", b"label"), strict=True):
            field["name"][: len(name)] = np.frombuffer(name, np.uint8)
        self._write_at(HEADER_DTYPE.itemsize, fields.tobytes())
        self._write_at(METADATA_START, self._metadata.view(np.uint8).data)
        self._write_at(self._page_start, table.view(np.uint8).data)
        os.fsync(self._file.fileno())
        header = np.zeros(1, HEADER_DTYPE)
        header[0] = (BETON_VERSION, 2, self.page_size, len(table), self._page_start)
        self._header = header.tobytes()
        num_bytes = self._page_start + table.nbytes
        checksums = self._checksums.tobytes()
        return ShardFile(
            name=self.path.name,
            num_samples=len(table),
            bytes=num_bytes,
            sha256=self._checksum(self._header),
            crc32=self.crc32_path.name,
            crc32_sha256=hashlib.sha256(checksums).hexdigest(),
        )

    def publish(self) -> None:
        """Writes the samples' checksums, completes the header and gives both files their final names."""
        if self._header is None:
            raise ValueError("publish before finish")
        publish_bytes(self.crc32_path, self._checksums.tobytes())
        self._write_at(0, self._header)
        os.fsync(self._file.fileno())
        publish(self.path)
        self._published = True

    def _flush_page(self) -> None:
        """Writes the current page, padded with zeros; the next one starts behind it."""
        self._page += bytes(self.page_size - len(self._page))
        self._write_at(self._page_start, self._page)
        self._page_start += self.page_size
        self._page = bytearray()

    def _write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._file.seek(offset)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def _checksum(self, header: bytes) -> str:
        """SHA-256 (hex) of the file as it will be with this header."""
        digest = hashlib.sha256(header)
        self._file.seek(len(header))
        while chunk := self._file.read(PAGE_SIZE):
            digest.update(chunk)
        return digest.hexdigest()
