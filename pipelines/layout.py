"""What lies on disk: the manifest of a shard set, and the one door to its samples.

SHARDS/manifest.json        schema version, source, classes, encode settings; per split its files and checksums; its own
SHARDS/quarantine.jsonl     the images that could not be converted, and why; only when there are any
format "beton" (`beton_reader`), read by FFCV too:
SHARDS/train.beton          images and labels
SHARDS/train.crc32          the CRC-32 of each sample's encoded image (uint32)
format "tar" (`tar_reader`), read by DALI's `readers.webdataset` and the `webdataset` library too:
SHARDS/train-000000.tar     sample 12 is 000000012.jpg and 000000012.cls (its label in digits)
SHARDS/train-000000.idx     DALI's index of it
SHARDS/train-000000.samples where each image lies, its size, label and CRC-32
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from pipelines.beton_reader import BetonReader
from pipelines.errors import ShardError
from pipelines.origin import Origin
from pipelines.tar_reader import TarReader

__all__ = [
    "FORMATS",
    "MANIFEST_NAME",
    "QUARANTINE_NAME",
    "SCHEMA_VERSION",
    "Manifest",
    "ShardFile",
    "ShardReader",
    "Split",
    "open_file",
    "open_split",
    "parse_split",
    "read_manifest",
    "sha256_of",
]

SCHEMA_VERSION: Final = 3
_READABLE: Final = (2, SCHEMA_VERSION)  # in 2, all checksums begin at the file's first byte
MANIFEST_NAME: Final = "manifest.json"
QUARANTINE_NAME: Final = "quarantine.jsonl"
FORMATS: Final = ("beton", "tar")


@dataclass(frozen=True)
class ShardFile:
    """One file of a split.

    Attributes:
        name: beside the manifest.
        num_samples: of this file.
        bytes: its size.
        sha256: of the whole file, hex: of its bytes from `hashed_from` on, followed by those before.
        sidecars: name and SHA-256 of each smaller file that belongs to it.
        hashed_from: where the images begin in a file whose first bytes are written last, so that it need not be read
            again for its checksum; else 0.
    """

    name: str
    num_samples: int
    bytes: int
    sha256: str
    sidecars: dict[str, str] = field(default_factory=dict)
    hashed_from: int = 0


@dataclass(frozen=True)
class Split:
    """One split of a shard set.

    Attributes:
        num_samples: of all its files.
        format: one of `FORMATS`.
        files: in sample order.
        num_quarantined: images of the source that could not be converted; `quarantine.jsonl` lists them.
        num_kept: samples whose JPEG coefficients are the original's, passed through without re-encoding.
    """

    num_samples: int
    format: str
    files: tuple[ShardFile, ...]
    num_quarantined: int = 0
    num_kept: int = 0

    @property
    def fingerprint(self) -> str:
        """Of all that is in its files, hex: the same for copies of a split, and another where any image differs."""
        return hashlib.sha256("".join(f"{file.sha256}\n" for file in self.files).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `parse_split` takes it back."""
        return {**vars(self), "files": [vars(file) for file in self.files]}


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a shard set.

    Attributes:
        source: where the images came from.
        classes: `classes[label]` is the class folder's name.
        encode: the encoder's settings.
        splits: by name.
        created_by: the libraries that decided the encoded bytes.
        quarantine_sha256: of `quarantine.jsonl`; None when there is none.
        origin: what became which split, and what was left out; None where that was not recorded.
    """

    source: str
    classes: tuple[str, ...]
    encode: dict[str, Any]
    splits: dict[str, Split]
    created_by: str
    quarantine_sha256: str | None = None
    schema_version: int = SCHEMA_VERSION
    origin: Origin | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to_json(self) -> str:
        """The file's text: sorted keys, so that equal manifests are equal bytes. `checksum` is that of all the rest."""
        raw = {**vars(self), "splits": {name: split.to_dict() for name, split in self.splits.items()}}
        del raw["origin"]  # the key is there only where something was recorded, as in manifests of before
        return _sealed(raw if self.origin is None else {**raw, "origin": self.origin.to_dict()})


def _sealed(raw: dict[str, Any]) -> str:
    """The text of a manifest that says this: the SHA-256 of its compact JSON with sorted keys goes in as `checksum`."""
    checksum = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return json.dumps({**raw, "checksum": checksum}, indent=1, sort_keys=True) + "\n"


class ShardReader(Protocol):
    """Random access to the samples of one split; safe to share between threads, cheap to send to a process.

    Attributes:
        path: what an error calls the split.
        num_samples: at least 0.
        labels: int64 (num_samples,).
        sizes: int32 (num_samples, 2): height, width in pixels.
        modes: uint8 (num_samples,): `beton_reader.MODE_JPEG` or `MODE_RAW`.
        nbytes: int64 (num_samples,): bytes of each encoded image.
    """

    path: Path
    num_samples: int
    labels: np.ndarray
    sizes: np.ndarray
    modes: np.ndarray
    nbytes: np.ndarray

    def encoded(self, sample_id: int) -> np.ndarray:
        """The bytes of one sample's image as a read-only uint8 view: a JPEG file, or raw (height, width, 3) pixels."""
        ...

    def addresses(self, sample_ids: np.ndarray) -> np.ndarray:
        """Where the bytes of these samples' images lie in memory while the reader lives: uint64 (n,)."""
        ...


def _no_manifest(directory: Path) -> str:
    """Why a directory without a manifest is no shard set, and what to do."""
    if directory.is_file():
        folder = directory.parent
        if (folder / MANIFEST_NAME).is_file():
            return f"a file of a shard set; give its folder, {folder}"
        if directory.suffix == ".beton":
            return "a .beton file, not a shard set; preprocess/adopt.py makes one of it"
        return "a file, not a shard set; give the folder that preprocess/build_ffcv.py made"
    wrong = f"no {MANIFEST_NAME} here, so it is no shard set"
    if (directory / "metrics.jsonl").is_file():
        return f"{wrong}, but a run (sdpnet report shows it); give the shard set that it was trained on"
    return f"{wrong} (make one with preprocess/build_ffcv.py)"


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads and checks `manifest.json` of a shard set, not the files that it names (see `open_split`).

    Raises `ShardError` when the directory or the manifest is missing, is not JSON, is of another schema version, has
    changed by so much as a bit, is incomplete, or names a file twice or outside the directory.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise ShardError(f"{directory}: {_no_manifest(directory)}")
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ShardError(f"{path}: not valid JSON ({reason}); convert the data set again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in _READABLE:
        raise ShardError(
            f"{path}: schema version {version!r}, but this sdpnet reads version {SCHEMA_VERSION}; "
            "convert the data set again, or use the sdpnet that wrote it"
        )
    try:
        if text != _sealed({key: value for key, value in raw.items() if key != "checksum"}):
            raise ShardError(f"{path}: was changed after it was written (checksum); copy it again or convert again")
        quarantine, origin = raw["quarantine_sha256"], raw.get("origin")
        manifest = Manifest(
            source=str(raw["source"]),
            classes=tuple(str(name) for name in raw["classes"]),
            encode=dict(raw["encode"]),
            splits={str(name): parse_split(split) for name, split in raw["splits"].items()},
            created_by=str(raw["created_by"]),
            quarantine_sha256=None if quarantine is None else str(quarantine),
            origin=None if origin is None else Origin.from_dict(origin),
        )
    except ShardError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError(f"{path}: incomplete or damaged ({type(error).__name__}: {error}); convert again") from None
    seen: set[str] = set()
    for split_name, split in manifest.splits.items():
        if split.format not in FORMATS:
            raise ShardError(f"{path}: split {split_name!r}: format {split.format!r} is none of {', '.join(FORMATS)}")
        if sum(file.num_samples for file in split.files) != split.num_samples:
            raise ShardError(f"{path}: split {split_name!r}: its files' sample counts do not add up; convert again")
        if split.format == "beton" and len(split.files) != 1:
            raise ShardError(f"{path}: split {split_name!r}: {len(split.files)} .beton files, but one holds it all")
        for file in split.files:
            for name in (file.name, *file.sidecars):
                if name in seen:
                    raise ShardError(f"{path}: file name {name!r} stands there twice; convert again")
                seen.add(name)
                if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
                    raise ShardError(f"{path}: file name {name!r} leaves the shard set's directory")
    return manifest


def parse_split(raw: dict[str, Any]) -> Split:
    """What `Split.to_dict` gave; raises KeyError, TypeError, ValueError or AttributeError for anything else."""
    files = tuple(
        ShardFile(
            name=str(f["name"]),
            num_samples=int(f["num_samples"]),
            bytes=int(f["bytes"]),
            sha256=str(f["sha256"]),
            sidecars={str(name): str(sha256) for name, sha256 in f["sidecars"].items()},
            hashed_from=int(f.get("hashed_from", 0)),
        )
        for f in raw["files"]
    )
    return Split(
        num_samples=int(raw["num_samples"]),
        format=str(raw["format"]),
        files=files,
        num_quarantined=int(raw["num_quarantined"]),
        num_kept=int(raw["num_kept"]),
    )


def open_split(directory: str | os.PathLike[str], split: str) -> tuple[Manifest, ShardReader]:
    """Opens one split of a shard set for random access: (manifest, reader).

    Raises `ShardError` for what `read_manifest` and the format's validator refuse, for a split that is not there, for a
    file that is absent or of another size than the manifest says, and for labels outside the manifest's classes.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        there = ", ".join(sorted(manifest.splits)) or "none"
        remedy = "; to make one, convert again with --val FOLDER or --val-share 0.05" if split == "val" else ""
        raise ShardError(
            f"{directory}: no split {split!r}; it has {there} (see data.train_split and data.val_split){remedy}"
        )
    found = manifest.splits[split]
    if found.format == "tar":
        for file in found.files:
            _check_file(directory, file)
        reader: ShardReader = TarReader([directory / file.name for file in found.files], directory / f"{split}-*.tar")
        return manifest, _checked(reader, found.num_samples, manifest)
    return manifest, open_file(directory, manifest, found.files[0])


def open_file(directory: str | os.PathLike[str], manifest: Manifest, file: ShardFile) -> ShardReader:
    """Opens one file of a shard set for random access; raises as `open_split` does."""
    directory = Path(directory)
    _check_file(directory, file)
    path = directory / file.name
    reader: ShardReader = BetonReader(path) if file.name.endswith(".beton") else TarReader([path], path)
    return _checked(reader, file.num_samples, manifest)


def _check_file(directory: Path, file: ShardFile) -> None:
    path = directory / file.name
    if not path.is_file():
        raise ShardError(f"{path}: the manifest names it, but it is not there; copy it here or convert again")
    size = path.stat().st_size
    if size != file.bytes:
        raise ShardError(
            f"{path}: {size:,} bytes, not the manifest's {file.bytes:,}: truncated or replaced; copy it again"
        )


def _checked(reader: ShardReader, num_samples: int, manifest: Manifest) -> ShardReader:
    if reader.num_samples != num_samples:
        raise ShardError(
            f"{reader.path}: {reader.num_samples} samples, but the manifest says {num_samples}; convert again"
        )
    if reader.num_samples and not 0 <= reader.labels.min() <= reader.labels.max() < manifest.num_classes:
        bad = int(np.flatnonzero((reader.labels < 0) | (reader.labels >= manifest.num_classes))[0])
        raise ShardError(
            f"{reader.path}: sample {bad}: label {reader.labels[bad]}, but there are {manifest.num_classes} classes"
        )
    return reader


def sha256_of(path: Path, first: int = 0) -> str:
    """SHA-256 of a file, hex: of its bytes from `first` on, followed by those before."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(first)
        while chunk := file.read(1 << 23):
            digest.update(chunk)
        file.seek(0)
        while first > 0 and (chunk := file.read(min(first, 1 << 23))):
            digest.update(chunk)
            first -= len(chunk)
    return digest.hexdigest()
