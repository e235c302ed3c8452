"""WebDataset tars as this project writes them, their validator and a reader.

Sample 12 with label 7 is two ustar members, each a 512-byte header and its data, padded with zeros to 512 bytes:

    000000012.jpg   the JPEG file
    000000012.cls   "7"

Two blocks of zeros end the file. Two files lie beside `NAME.tar`: `NAME.samples` has one `SAMPLE_DTYPE` record per
sample, so that a reader knows all offsets, sizes and labels without reading through the tar, and `NAME.idx` is the
index that DALI needs.

Formats: https://github.com/webdataset/webdataset (the tars), DALI's `wds2idx` (the index).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.beton import MAX_PIXELS_PER_BYTE, MODE_JPEG
from sdpnet.pipelines.shards.file import MappedFile
from sdpnet.pipelines.shards.places import Places

__all__ = ["BLOCK", "END_BYTES", "SAMPLE_DTYPE", "TarReader", "sample_bytes", "validate_tar"]

BLOCK: Final = 512
END_BYTES: Final = 2 * BLOCK
# `offset` is the position of the image's first byte in the tar.
SAMPLE_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("height", "<u2"), ("width", "<u2"), ("label", "<i4"), ("crc32", "<u4")]
)

_PIECE: Final = 65_536  # the number of samples that are read and checked at a time


def sample_bytes(size: Any) -> Any:
    """The number of bytes of a sample in a tar: two headers, the label, and an image of `size` bytes.

    `size` is a number or an array.
    """
    return 3 * BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK


def validate_tar(path: str | Path) -> np.ndarray:
    """Checks that a tar and its `.samples` file match, and returns the records: `SAMPLE_DTYPE` (num_samples,).

    Only the tar's size and the `.samples` file are read.

    Raises:
        ShardError: the files are invalid. The message names the file, the invalid sample and what to do.
    """
    return _table(MappedFile(path))


def _table(tar: MappedFile) -> np.ndarray:
    """Validates an open tar; see `validate_tar`."""
    path, tar_size = tar.path, tar.size
    table_path = path.with_suffix(".samples")

    def refuse(at: Path, problem: str) -> ShardError:
        return ShardError(f"{at}: {problem}; the file is damaged or incomplete: copy or convert it again")

    file = MappedFile(table_path)
    num_samples, rest = divmod(file.size, SAMPLE_DTYPE.itemsize)
    if rest:
        raise refuse(table_path, f"{file.size} bytes are not a whole number of {SAMPLE_DTYPE.itemsize}-byte records")
    if num_samples * sample_bytes(1) + END_BYTES > tar_size:
        raise refuse(table_path, f"lists more samples than the {tar_size:,} bytes of {path.name} can hold")
    # The writer leaves no gaps, so the sizes alone determine every offset: each record is checked against the sum of
    # the sizes before it, piece by piece, without reading the tar.
    first, end = 0, np.uint64(0)
    pieces = [np.zeros(0, SAMPLE_DTYPE)]

    def require(ok: np.ndarray, problem: str) -> None:
        if not ok.all():
            raise refuse(table_path, f"sample {first + int(np.flatnonzero(~ok)[0])}: {problem}")

    while first < num_samples:
        piece = file.read(SAMPLE_DTYPE, first * SAMPLE_DTYPE.itemsize, min(_PIECE, num_samples - first))
        require(piece["size"] > 0, "an image without bytes")
        require((piece["width"] > 0) & (piece["height"] > 0), "an image without pixels")
        pixels = piece["width"].astype(np.uint64) * piece["height"]
        enough = piece["size"].astype(np.uint64) * np.uint64(MAX_PIXELS_PER_BYTE)
        require(pixels <= enough, "more pixels than its bytes can hold")
        sizes = sample_bytes(piece["size"].astype(np.uint64))
        ends = end + np.cumsum(sizes, dtype=np.uint64)
        starts = ends - sizes + np.uint64(BLOCK)
        require(piece["offset"] == starts, "its offset does not match the sizes before it")
        require(ends <= tar_size, "its image lies beyond the tar's end")
        pieces.append(piece)
        first, end = first + len(piece), ends[-1]
    table = np.concatenate(pieces)
    if int(end) + END_BYTES != tar_size:
        raise refuse(path, f"{tar_size:,} bytes, but its {len(table):,} samples take {int(end) + END_BYTES:,}")
    file.check()
    return table


class TarReader:
    """Reads the samples of validated tars in any order, through read-only memory maps.

    See `sdpnet.pipelines.shards.layout.ShardReader`. Sample numbers run through all `files` in their order.
    """

    def __init__(self, files: list[Path], path: Path, sizes: list[int] | None = None) -> None:
        """Opens and validates tars.

        Args:
            files: the tars.
            path: the name of all of them together in errors.
            sizes: the expected number of bytes of each tar, if known.

        Raises `ShardError` as `validate_tar` does, and if a tar's size differs from the expected one.
        """
        self.files = [MappedFile(*of) for of in (zip(files, sizes, strict=True) if sizes else zip(files))]
        tables = [_table(file) for file in self.files]
        table = np.concatenate(tables) if tables else np.zeros(0, SAMPLE_DTYPE)
        self.path = path
        self.num_samples = len(table)
        self.labels = table["label"].astype(np.int64)
        self.sizes = np.stack([table["height"], table["width"]], axis=1).astype(np.int32)
        self.modes = np.full(len(table), MODE_JPEG, np.uint8)
        self.nbytes = table["size"].astype(np.int64)
        self._first = np.cumsum([0, *map(len, tables)])[:-1]  # the number of each file's first sample
        self._starts = table["offset"].astype(np.int64)
        for file in self.files:
            _ = file.data  # mapped now, so that it is the file that was checked

    def encoded(self, sample_id: int) -> np.ndarray:
        """The JPEG file of one sample, read-only uint8 (n,)."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(sample_id)
        file = int(np.searchsorted(self._first, sample_id, "right")) - 1
        return self.files[file].view(int(self._starts[sample_id]), int(self.nbytes[sample_id]))

    def places(self, sample_ids: np.ndarray) -> Places:
        """The places of samples' images, for the native decoder."""
        files, which = np.unique(np.searchsorted(self._first, sample_ids, "right") - 1, return_inverse=True)
        bases = np.array([self.files[file].data.ctypes.data for file in files.tolist()], np.uint64)
        return Places(self._starts[sample_ids].astype(np.uint64) + bases[which], self.nbytes[sample_ids])

    def file_of(self, sample_id: int) -> str:
        """The path of the file that holds a sample's image."""
        return str(self.files[int(np.searchsorted(self._first, sample_id, "right")) - 1].path)

    def check(self, sample_ids: np.ndarray) -> None:
        """Raises `ShardError` if a file that contains one of these samples was changed since it was opened."""
        for file in np.unique(np.searchsorted(self._first, sample_ids, "right") - 1).tolist():
            self.files[file].check()
