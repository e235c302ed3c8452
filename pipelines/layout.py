"""What lies on disk: the manifest of a shard set and the `.beton` format, and a reader that trusts neither.

    SHARDS/manifest.json      schema version, source, classes, encode settings; per split its files, sizes, checksums
    SHARDS/train.beton        FFCV's format, version 2, with the fields `image` (RGBImageField) and `label` (IntField)
    SHARDS/train.crc32        the CRC-32 of each sample's encoded image (uint32), to find what a changed file has lost

A `.beton` file, all integers little-endian:

    header (24 bytes) | field descriptors (1041 bytes each) | metadata (24 bytes a sample) | padding to a page
    | pages of encoded images, none across a page's end | allocation table (24 bytes a sample) to the end of file

Format: https://github.com/libffcv/ffcv (`ffcv/types.py`, `ffcv/writer.py`). FFCV itself follows every pointer and
size in the file unchecked, so `validate_beton` stands before every reader, FFCV's included.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipelines.errors import ShardError

__all__ = [
    "ALLOCATION_DTYPE",
    "BETON_VERSION",
    "CRC32_DTYPE",
    "FIELD_DTYPE",
    "HEADER_DTYPE",
    "IMAGE_FIELD_TYPE",
    "LABEL_FIELD_TYPE",
    "MANIFEST_NAME",
    "METADATA_DTYPE",
    "MODE_JPEG",
    "MODE_RAW",
    "SCHEMA_VERSION",
    "BetonReader",
    "Manifest",
    "ShardFile",
    "Split",
    "open_split",
    "read_manifest",
    "validate_beton",
]

SCHEMA_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"

BETON_VERSION: Final = 2
IMAGE_FIELD_TYPE: Final = 2  # FFCV's RGBImageField
LABEL_FIELD_TYPE: Final = 1  # FFCV's IntField
MODE_JPEG: Final = 0
MODE_RAW: Final = 1

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
# The image's own part is packed (13 bytes); the label follows at its natural alignment.
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


@dataclass(frozen=True)
class ShardFile:
    """One file of a split: its name beside the manifest, size in bytes and SHA-256 (hex); `crc32` names the file of its
    samples' checksums, `crc32_sha256` is that file's own."""

    name: str
    num_samples: int
    bytes: int
    sha256: str
    crc32: str
    crc32_sha256: str


@dataclass(frozen=True)
class Split:
    """One split of a shard set: `format` is "beton"; `files` are in sample order. `num_quarantined` images of the
    source could not be converted; `quarantine.jsonl` lists them."""

    num_samples: int
    format: str
    files: tuple[ShardFile, ...]
    num_quarantined: int = 0


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a shard set. `classes[label]` is the class folder's name; `encode` the encoder's settings."""

    source: str
    classes: tuple[str, ...]
    encode: dict[str, Any]
    splits: dict[str, Split]
    created_by: str
    schema_version: int = SCHEMA_VERSION

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to_json(self) -> str:
        """The file's text: sorted keys, so that equal manifests are equal bytes."""
        splits = {
            name: {
                "num_samples": split.num_samples,
                "format": split.format,
                "num_quarantined": split.num_quarantined,
                "files": [vars(file) for file in split.files],
            }
            for name, split in self.splits.items()
        }
        return json.dumps({**vars(self), "splits": splits}, indent=1, sort_keys=True) + "\n"


def read_manifest(directory: str | Path) -> Manifest:
    """Reads and checks `manifest.json` of a shard set, not the files that it names (see `open_split`).

    Raises `ShardError` when the directory or the manifest is missing, is not JSON, is of another schema version,
    is incomplete, or names a file outside the directory.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ShardError(
            f"{directory}: no {MANIFEST_NAME} here, so it is no shard set (make one with preprocess/build_ffcv.py)"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{path}: not valid JSON ({error}); convert the data set again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ShardError(
            f"{path}: schema version {version!r}, but this sdpnet reads version {SCHEMA_VERSION}; "
            "convert the data set again, or use the sdpnet that wrote it"
        )
    try:
        manifest = Manifest(
            source=str(raw["source"]),
            classes=tuple(str(name) for name in raw["classes"]),
            encode=dict(raw["encode"]),
            splits={str(name): _parse_split(split) for name, split in raw["splits"].items()},
            created_by=str(raw["created_by"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ShardError(f"{path}: incomplete or damaged ({type(error).__name__}: {error}); convert again") from None
    for split in manifest.splits.values():
        for file in split.files:
            for name in (file.name, file.crc32):
                if os.path.basename(name) != name or name in ("", ".", ".."):
                    raise ShardError(f"{path}: file name {name!r} leaves the shard set's directory")
    return manifest


def _parse_split(raw: dict[str, Any]) -> Split:
    files = tuple(
        ShardFile(
            name=str(f["name"]),
            num_samples=int(f["num_samples"]),
            bytes=int(f["bytes"]),
            sha256=str(f["sha256"]),
            crc32=str(f["crc32"]),
            crc32_sha256=str(f["crc32_sha256"]),
        )
        for f in raw["files"]
    )
    split = Split(int(raw["num_samples"]), str(raw["format"]), files, int(raw["num_quarantined"]))
    if sum(file.num_samples for file in files) != split.num_samples:
        raise ValueError("the files' sample counts do not add up to the split's")
    return split


def _check_file(directory: Path, file: ShardFile) -> None:
    path = directory / file.name
    if not path.is_file():
        raise ShardError(f"{path}: the manifest names it, but it is not there; copy it here or convert again")
    size = path.stat().st_size
    if size != file.bytes:
        raise ShardError(
            f"{path}: {size:,} bytes, not the manifest's {file.bytes:,}: truncated or replaced; copy it again"
        )


def open_split(directory: str | Path, split: str) -> tuple[Manifest, BetonReader]:
    """Opens one split of a shard set for random access: (manifest, reader).

    Raises `ShardError` for what `read_manifest` and `validate_beton` refuse, for a split that is not there, for a file
    that is absent or of another size than the manifest says, and for labels outside the manifest's classes.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        there = ", ".join(sorted(manifest.splits)) or "none"
        raise ShardError(f"{directory}: no split {split!r}; it has {there} (see data.train_split and data.val_split)")
    files = manifest.splits[split].files
    if manifest.splits[split].format != "beton" or len(files) != 1:
        raise ShardError(f"{directory}: split {split!r} is not a single .beton file, the only kind this version reads")
    _check_file(directory, files[0])
    reader = BetonReader(directory / files[0].name)
    if reader.num_samples != files[0].num_samples:
        raise ShardError(
            f"{reader.path}: {reader.num_samples} samples, but the manifest says {files[0].num_samples}; convert again"
        )
    if reader.num_samples and not 0 <= reader.labels.min() <= reader.labels.max() < manifest.num_classes:
        bad = int(np.flatnonzero((reader.labels < 0) | (reader.labels >= manifest.num_classes))[0])
        raise ShardError(
            f"{reader.path}: sample {bad}: label {reader.labels[bad]}, but there are {manifest.num_classes} classes"
        )
    return manifest, reader


def validate_beton(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Checks the whole structure of a `.beton` file and returns its tables.

    Reads the header and the two tables only, no image: time and memory are proportional to the number of samples that
    the file really has room for.

    Returns:
        metadata: `METADATA_DTYPE` (num_samples,), and
        sizes: uint64 (num_samples,), the bytes of each sample's image.

    Raises:
        ShardError: naming the file, the offending part (and sample) and what to do.
    """
    path = Path(path)

    def refuse(problem: str) -> ShardError:
        return ShardError(f"{path}: {problem}; the file is damaged or incomplete: copy or convert it again")

    try:
        file_size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        if file_size < HEADER_DTYPE.itemsize:
            raise refuse(f"only {file_size} bytes, shorter than a .beton header")
        header = np.frombuffer(file.read(HEADER_DTYPE.itemsize), HEADER_DTYPE)[0]
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
            raise refuse(f"page size {page_size} is no power of two")
        if not metadata_end <= table_start <= file_size:
            raise refuse(
                f"{num_samples} samples and an allocation table at byte {table_start} do not fit its {file_size} bytes"
            )
        if file_size - table_start != num_samples * ALLOCATION_DTYPE.itemsize:
            raise refuse(f"its allocation table has {file_size - table_start} bytes, not {num_samples} entries")
        fields = np.frombuffer(file.read(num_fields * FIELD_DTYPE.itemsize), FIELD_DTYPE)
        kinds = [(int(field["type_id"]), field["name"].tobytes().rstrip(b"\0")) for field in fields]
        if kinds != [(IMAGE_FIELD_TYPE, b"image"), (LABEL_FIELD_TYPE, b"label")]:
            raise ShardError(f"{path}: its fields are not image (RGBImageField) and label (IntField), in this order")
        metadata = np.fromfile(file, METADATA_DTYPE, num_samples)
        file.seek(table_start)
        table = np.fromfile(file, ALLOCATION_DTYPE, num_samples)
    if len(metadata) != num_samples or len(table) != num_samples:
        raise refuse("it became shorter while it was read")
    if num_samples == 0:
        return metadata, np.zeros(0, np.uint64)

    table = table[np.argsort(table["sample_id"], kind="stable")]
    pointers, sizes = table["ptr"], table["size"]

    def require(ok: np.ndarray, problem: str) -> None:
        if not ok.all():
            raise refuse(f"sample {int(np.flatnonzero(~ok)[0])}: {problem}")

    require(
        table["sample_id"] == np.arange(num_samples, dtype=np.uint64),
        "not exactly one entry in the allocation table",
    )
    require(metadata["data_ptr"] == pointers, "metadata and allocation table point to different places")
    limit = np.uint64(table_start)
    require((sizes > 0) & (sizes <= limit), "impossible size")
    require(
        (pointers >= np.uint64(metadata_end)) & (pointers <= limit - sizes),
        "its image lies outside the data region",
    )
    page = np.uint64(page_size)
    require(pointers // page == (pointers + sizes - np.uint64(1)) // page, "its image crosses a page's end")
    require((metadata["mode"] == MODE_JPEG) | (metadata["mode"] == MODE_RAW), "unknown image mode")
    require((metadata["width"] > 0) & (metadata["height"] > 0), "an image without pixels")
    pixels = metadata["width"].astype(np.uint64) * metadata["height"]
    require(
        (metadata["mode"] != MODE_RAW) | (sizes == 3 * pixels),
        "a raw image of another size than its pixels need",
    )
    order = np.argsort(pointers, kind="stable")
    overlapping = pointers[order][:-1] + sizes[order][:-1] > pointers[order][1:]
    if overlapping.any():
        raise refuse(f"sample {int(order[np.flatnonzero(overlapping)[0]])}: its image overlaps the next one")
    return metadata, sizes


class BetonReader:
    """Random access to a validated `.beton` file through one read-only memory map; safe to share between threads.

    Attributes:
        labels: int64 (num_samples,).
        sizes: int32 (num_samples, 2): height, width in pixels.
        modes: uint8 (num_samples,): `MODE_JPEG` or `MODE_RAW`.
        nbytes: int64 (num_samples,): bytes of each encoded image.
    """

    def __init__(self, path: str | Path) -> None:
        metadata, nbytes = validate_beton(path)
        self.path = Path(path)
        self.num_samples = len(metadata)
        self.labels = np.ascontiguousarray(metadata["label"])
        self.sizes = np.stack([metadata["height"], metadata["width"]], axis=1).astype(np.int32)
        self.modes = np.ascontiguousarray(metadata["mode"])
        self._starts = metadata["data_ptr"].astype(np.int64)
        self.nbytes = nbytes.astype(np.int64)
        self._map: np.ndarray | None = None

    def encoded(self, sample_id: int) -> np.ndarray:
        """The bytes of one sample's image as a read-only uint8 view: a JPEG file, or raw (height, width, 3) pixels."""
        if self._map is None:
            self._map = np.memmap(self.path, np.uint8, mode="r")
        start = self._starts[sample_id]
        return self._map[start : start + self.nbytes[sample_id]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a worker process maps the file itself
