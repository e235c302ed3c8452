"""`manifest.json` of a shard set: its content, and a reader that checks every value."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.shards.file import read_whole
from sdpnet.pipelines.shards.missing import why_no_shard_set
from sdpnet.pipelines.shards.origin import Origin, count_of, text_of

__all__ = [
    "FORMATS",
    "MANIFEST_NAME",
    "QUARANTINE_NAME",
    "SCHEMA_VERSION",
    "UNFINISHED_NAME",
    "Manifest",
    "ShardFile",
    "Split",
    "parse_split",
    "read_manifest",
]

SCHEMA_VERSION: Final = 3
_READABLE: Final = (2, SCHEMA_VERSION)  # in version 2, all checksums begin at the file's first byte
MANIFEST_NAME: Final = "manifest.json"
QUARANTINE_NAME: Final = "quarantine.jsonl"
UNFINISHED_NAME = ".unfinished"  # the folder with the work of a conversion that has not ended
FORMATS: Final = ("beton", "tar", "index")
_MAX_BYTES: Final = 16 << 20  # the size of a manifest with 25,000 tars, or with a million classes
_LONGEST_REASON: Final = 300  # characters
_LONGEST_NAME: Final = 255  # bytes, the limit of file systems
_TOO_DEEP: Final = re.compile(r"^ {16}", re.MULTILINE)  # a manifest has six levels, each indented by one space

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 120


@dataclass(frozen=True)
class ShardFile:
    """One file of a split.

    Attributes:
        name: the file's name; the file lies beside the manifest.
        num_samples: the number of samples in this file.
        bytes: the file's size.
        sha256: the SHA-256, in hex, of the file's bytes from `hashed_from` on, followed by the bytes before.
        sidecars: the name and the SHA-256 of each smaller file that belongs to it.
        hashed_from: the position of the images in a file whose first bytes are written last, else 0. The checksum
            begins there, so that the file need not be read again for it.
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
        num_samples: the number of samples in all files.
        format: one of `FORMATS`.
        files: the files in sample order.
        num_quarantined: the number of source images that could not be converted; `quarantine.jsonl` lists them.
        num_kept: the number of samples that were not re-encoded: their JPEG coefficients are the original's.
    """

    num_samples: int
    format: str
    files: tuple[ShardFile, ...]
    num_quarantined: int = 0
    num_kept: int = 0

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all files, in hex. It is equal for copies, and differs if any image differs."""
        return hashlib.sha256("".join(f"{file.sha256}\n" for file in self.files).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; `parse_split` reads them back."""
        return {**vars(self), "files": [vars(file) for file in self.files]}


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a shard set.

    Attributes:
        source: the folder or archive that the images came from.
        classes: the names of the class folders; `classes[label]` is the name of a label.
        encode: the encoder's settings.
        splits: the splits by name.
        created_by: the libraries that the encoded bytes depend on.
        quarantine_sha256: the SHA-256 of `quarantine.jsonl`; None if there is no such file.
        schema_version: the version of the manifest's format.
        origin: which part of the source became which split, and which files are in none; None if not recorded.
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
        """The text of the file.

        Keys are sorted, so that equal manifests are equal bytes. `checksum` covers all other keys.
        """
        raw = {**vars(self), "splits": {name: split.to_dict() for name, split in self.splits.items()}}
        del raw["origin"]  # older manifests lack the key, so it is written only if an origin was recorded
        return _with_checksum(raw if self.origin is None else {**raw, "origin": self.origin.to_dict()})


def _with_checksum(raw: dict[str, Any]) -> str:
    """The text of a manifest: its values and, as `checksum`, the SHA-256 of their JSON with sorted keys."""
    checksum = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return json.dumps({**raw, "checksum": checksum}, indent=1, sort_keys=True) + "\n"


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads and checks `manifest.json` of a shard set. The files that it names are not checked (see `open_split`).

    Raises `ShardError` if the directory or the manifest is missing, or if the manifest is not JSON, has another schema
    version, was changed by even one bit, is incomplete, or names a file twice or outside the directory.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    if not os.path.exists(path):
        raise ShardError(f"{directory}: {why_no_shard_set(directory, MANIFEST_NAME)}")
    content = read_whole(path, _MAX_BYTES, f"the {_MAX_BYTES:,} that a manifest may have")
    try:
        text = content.decode()
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ShardError(f"{path}: not valid JSON ({reason}); convert the data set again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is not int or version not in _READABLE:
        raise ShardError(
            f"{path}: schema version {_shown.repr(version)}, but this sdpnet reads version {SCHEMA_VERSION}; "
            "convert the data set again, or use the sdpnet that wrote it"
        )
    try:
        if text != _with_checksum({key: value for key, value in raw.items() if key != "checksum"}):
            raise ShardError(f"{path}: was changed after it was written (checksum); copy it again or convert again")
        if _TOO_DEEP.search(text):
            raise ValueError("values nested too deeply")
        json.dumps(raw, ensure_ascii=False).encode("utf-8", "surrogateescape")
        manifest = _manifest(raw)
    except ShardError:
        raise
    except UnicodeEncodeError as error:
        what = _shown.repr(error.object[max(0, error.start - 20) : error.start + 20])
        raise ShardError(f"{path}: {what} has half of a surrogate pair, which is not text; convert again") from None
    except UserError as error:  # a setting of the encoder is out of range
        raise ShardError(f"{path}: encode: {str(error)[:_LONGEST_REASON]}; convert again") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
        raise ShardError(f"{path}: incomplete or damaged ({reason}); convert again") from None
    seen: set[str] = set()
    for split_name, split in manifest.splits.items():
        shown = _shown.repr(split_name)
        if split.format not in FORMATS:
            found = _shown.repr(split.format)
            raise ShardError(f"{path}: split {shown}: format {found} is not one of {', '.join(FORMATS)}")
        if sum(file.num_samples for file in split.files) != split.num_samples:
            raise ShardError(f"{path}: split {shown}: its files' sample counts do not add up; convert again")
        if split.format != "tar" and len(split.files) != 1:
            raise ShardError(f"{path}: split {shown}: {len(split.files)} .{split.format} files, but one holds it all")
        for file in split.files:
            for name in (file.name, *file.sidecars):
                if name in seen:
                    raise ShardError(f"{path}: file name {_shown.repr(name)} is listed twice; convert again")
                seen.add(name)
                if os.path.basename(name) != name or name in ("", ".", "..") or "\0" in name:
                    raise ShardError(f"{path}: file name {_shown.repr(name)} lies outside the shard set's directory")
                if len(name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
                    raise ShardError(f"{path}: file name {_shown.repr(name)} is longer than file names may be")
            if not file.name.endswith(f".{split.format}"):
                raise ShardError(f"{path}: file name {_shown.repr(file.name)} in a split of format {split.format}")
    return manifest


def _manifest(raw: dict[str, Any]) -> Manifest:
    """Makes a manifest from JSON values.

    Raises `KeyError`, `TypeError`, `ValueError`, `AttributeError` or `UserError` for values that no manifest has.
    """
    quarantine, origin, classes = raw["quarantine_sha256"], raw.get("origin"), raw["classes"]
    if not isinstance(classes, list):
        raise TypeError("classes is not a list")
    encode = dict(raw["encode"])
    Preprocessing.of(encode)  # checks the settings that training and prediction use
    return Manifest(
        source=text_of(raw["source"]),
        classes=tuple(map(text_of, classes)),
        encode=encode,
        splits={name: parse_split(split) for name, split in raw["splits"].items()},
        created_by=text_of(raw["created_by"]),
        quarantine_sha256=None if quarantine is None else text_of(quarantine),
        origin=None if origin is None else Origin.from_dict(origin),
    )


def parse_split(raw: dict[str, Any]) -> Split:
    """Makes a split from the values of `Split.to_dict`.

    Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for other values.
    """
    files = tuple(
        ShardFile(
            name=text_of(f["name"]),
            num_samples=count_of(f["num_samples"]),
            bytes=count_of(f["bytes"]),
            sha256=text_of(f["sha256"]),
            sidecars={name: text_of(sha256) for name, sha256 in f["sidecars"].items()},
            hashed_from=count_of(f.get("hashed_from", 0)),
        )
        for f in raw["files"]
    )
    return Split(
        num_samples=count_of(raw["num_samples"]),
        format=text_of(raw["format"]),
        files=files,
        num_quarantined=count_of(raw["num_quarantined"]),
        num_kept=count_of(raw["num_kept"]),
    )
