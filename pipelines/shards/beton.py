"""The `.beton` format (FFCV's, version 2), its validator and a reader.

All integers are little-endian:

    header (24 bytes) | field descriptors (1041 bytes each) | metadata (24 bytes per sample) | padding to a page
    | pages of encoded images, none across a page's end | allocation table (24 bytes per sample) to the end of file

The fields are `image` (RGBImageField) and `label` (IntField). Format: https://github.com/libffcv/ffcv (`ffcv/types.py`,
`ffcv/writer.py`). FFCV follows every pointer and size in the file without checking it, so every file is validated
before any reader opens it, FFCV's included.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.file import MappedFile
from sdpnet.pipelines.shards.places import Places

__all__ = [
    "ALLOCATION_DTYPE",
    "BETON_VERSION",
    "CRC32_DTYPE",
    "FIELD_DTYPE",
    "HEADER_DTYPE",
    "IMAGE_FIELD_TYPE",
    "LABEL_FIELD_TYPE",
    "MAX_PIXELS_PER_BYTE",
    "METADATA_DTYPE",
    "MODE_JPEG",
    "MODE_RAW",
    "BetonReader",
    "validate_beton",
]

BETON_VERSION: Final = 2
IMAGE_FIELD_TYPE: Final = 2  # FFCV's RGBImageField
LABEL_FIELD_TYPE: Final = 1  # FFCV's IntField
MODE_JPEG: Final = 0
MODE_RAW: Final = 1
MAX_PIXELS_PER_BYTE: Final = 512  # a JPEG needs at least one bit of Huffman code per 8 x 8 block

HEADER_DTYPE = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD_DTYPE = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
# The image's part is packed (13 bytes); the label follows at its natural alignment.
METADATA_DTYPE = np.dtype(
    {
        "names": ["mode", "width", "height", "data_ptr", "label"],
        "formats": ["<u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
CRC32_DTYPE = np.dtype("<u4")
ALLOCATION_DTYPE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_PIECE: Final = 65_536  # the number of samples that are read and checked at a time


def validate_beton(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Checks the whole structure of a `.beton` file and returns its tables.

    Only the header and the two tables are read, no image. Time and memory are proportional to the number of samples
    before the first invalid one.

    Returns:
        metadata: `METADATA_DTYPE` (num_samples,), and
        sizes: uint64 (num_samples,), the number of bytes of each sample's image.

    Raises:
        ShardError: the file is invalid. The message names the file, the invalid part (and sample) and what to do.
    """
    return _tables(MappedFile(path))


def _tables(file: MappedFile) -> tuple[np.ndarray, np.ndarray]:
    """Validates an open file; see `validate_beton`."""
    path, file_size = file.path, file.size

    def refuse(problem: str) -> ShardError:
        return ShardError(f"{path}: {problem}; the file is damaged or incomplete: copy or convert it again")

    if file_size < HEADER_DTYPE.itemsize:
        raise refuse(f"only {file_size} bytes, shorter than a .beton header")
    header = file.read(HEADER_DTYPE, 0, 1)[0]
    version, num_fields = int(header["version"]), int(header["num_fields"])
    page_size, num_samples = int(header["page_size"]), int(header["num_samples"])
    table_start = int(header["alloc_table_ptr"])
    if version == 0 or table_start == 0:
        raise refuse("its header was never completed (the writer was stopped)")
    if version != BETON_VERSION:
        raise refuse(f"not a .beton file of version {BETON_VERSION} (its version field says {version})")
    if num_fields != 2:
        raise ShardError(f"{path}: {num_fields} fields; sdpnet reads .beton files with exactly image and label")
    metadata_start = HEADER_DTYPE.itemsize + num_fields * FIELD_DTYPE.itemsize
    metadata_end = metadata_start + num_samples * METADATA_DTYPE.itemsize
    if page_size == 0 or page_size & (page_size - 1):
        raise refuse(f"page size {page_size} is not a power of two")
    if not metadata_end <= table_start <= file_size:
        raise refuse(
            f"{num_samples} samples and an allocation table at byte {table_start} do not fit its {file_size} bytes"
        )
    if file_size - table_start != num_samples * ALLOCATION_DTYPE.itemsize:
        raise refuse(f"its allocation table has {file_size - table_start} bytes, not {num_samples} entries")
    fields = file.read(FIELD_DTYPE, HEADER_DTYPE.itemsize, num_fields)
    kinds = [(int(field["type_id"]), field["name"].tobytes().rstrip(b"\0")) for field in fields]
    if kinds != [(IMAGE_FIELD_TYPE, b"image"), (LABEL_FIELD_TYPE, b"label")]:
        raise ShardError(f"{path}: its fields are not image (RGBImageField) and label (IntField), in this order")

    def require(ok: np.ndarray, problem: str, samples: np.ndarray | None = None) -> None:
        if not ok.all():
            wrong = int(np.flatnonzero(~ok)[0])
            raise refuse(f"sample {wrong if samples is None else int(samples[wrong])}: {problem}")

    # Pointers and sizes are compared as uint64, without overflow: a size is at most `limit` before it is subtracted
    # from it, and a pointer is below `limit` before a size is added.
    limit, page = np.uint64(table_start), np.uint64(page_size)

    def check_metadata(metadata: np.ndarray, samples: np.ndarray) -> None:
        require((metadata["mode"] == MODE_JPEG) | (metadata["mode"] == MODE_RAW), "unknown image mode", samples)
        require((metadata["width"] > 0) & (metadata["height"] > 0), "an image without pixels", samples)

    def check_table(table: np.ndarray, _: np.ndarray) -> None:
        samples, pointers, sizes = table["sample_id"], table["ptr"], table["size"]
        require((sizes > 0) & (sizes <= limit), "impossible size", samples)
        inside = (pointers >= np.uint64(metadata_end)) & (pointers <= limit - sizes)
        require(inside, "its image lies outside the data region", samples)
        one_page = pointers // page == (pointers + sizes - np.uint64(1)) // page
        require(one_page, "its image crosses a page's end", samples)

    def read(dtype: np.dtype, start: int, check: Callable[[np.ndarray, np.ndarray], None]) -> np.ndarray:
        """Reads and checks a table in pieces.

        A sparse file may claim more samples than fit into memory, but then its first samples are invalid already.
        """
        pieces = [np.zeros(0, dtype)]
        for first in range(0, num_samples, _PIECE):
            last = min(first + _PIECE, num_samples)
            piece = file.read(dtype, start + first * dtype.itemsize, last - first)
            check(piece, np.arange(first, last))
            pieces.append(piece)
        return np.concatenate(pieces)

    metadata = read(METADATA_DTYPE, metadata_start, check_metadata)
    table = read(ALLOCATION_DTYPE, table_start, check_table)

    table = table[np.argsort(table["sample_id"], kind="stable")]
    pointers, sizes = table["ptr"], table["size"]
    require(
        table["sample_id"] == np.arange(num_samples, dtype=np.uint64),
        "not exactly one entry in the allocation table",
    )
    require(metadata["data_ptr"] == pointers, "metadata and allocation table point to different places")
    pixels = metadata["width"].astype(np.uint64) * metadata["height"]
    require(
        (metadata["mode"] != MODE_RAW) | (sizes == 3 * pixels),
        "a raw image of another size than its pixels need",
    )
    require(
        (metadata["mode"] != MODE_JPEG) | (pixels <= sizes * np.uint64(MAX_PIXELS_PER_BYTE)),
        "more pixels than its bytes can hold",
    )
    order = np.argsort(pointers, kind="stable")
    overlapping = pointers[order][:-1] + sizes[order][:-1] > pointers[order][1:]
    if overlapping.any():
        raise refuse(f"sample {int(order[np.flatnonzero(overlapping)[0]])}: its image overlaps the next one")
    file.check()
    return metadata, sizes


class BetonReader:
    """Reads the samples of a validated `.beton` file in any order, through one read-only memory map.

    It may be shared between threads.

    Attributes:
        labels: int64 (num_samples,).
        sizes: int32 (num_samples, 2), height and width in pixels.
        modes: uint8 (num_samples,), `MODE_JPEG` or `MODE_RAW`.
        nbytes: int64 (num_samples,), the number of bytes of each encoded image.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        """Opens and validates a file. `size` is its expected number of bytes, if known.

        Raises `ShardError` as `validate_beton` does, and if the file's size differs from `size`.
        """
        self.file = MappedFile(path, size)
        metadata, nbytes = _tables(self.file)
        self.path = self.file.path
        self.num_samples = len(metadata)
        self.labels = np.ascontiguousarray(metadata["label"])
        self.sizes = np.stack([metadata["height"], metadata["width"]], axis=1).astype(np.int32)
        self.modes = np.ascontiguousarray(metadata["mode"])
        self._starts = metadata["data_ptr"].astype(np.int64)
        self.nbytes = nbytes.astype(np.int64)
        _ = self.file.data  # mapped now, so that it is the file that was checked

    def encoded(self, sample_id: int) -> np.ndarray:
        """The bytes of one sample's image, read-only uint8 (n,): a JPEG file, or raw pixels (height, width, 3)."""
        return self.file.view(int(self._starts[sample_id]), int(self.nbytes[sample_id]))

    def places(self, sample_ids: np.ndarray) -> Places:
        """The places of samples' images, for the native decoder."""
        base = np.uint64(self.file.data.ctypes.data)
        return Places(self._starts[sample_ids].astype(np.uint64) + base, self.nbytes[sample_ids])

    def file_of(self, sample_id: int) -> str:
        """The path of the file that holds a sample's image."""
        return str(self.path)

    def check(self, sample_ids: np.ndarray) -> None:
        """Raises `ShardError` if the file was changed since it was opened."""
        self.file.check()
