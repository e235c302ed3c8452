"""What survives a kill: which images are on disk for good, said in an append-only journal.

    NAME.records     one `RECORD_DTYPE` record an image, in the order of the source
    journal.jsonl    a line for each `Entry`: what is converted, then what is done of it

A line is its CRC-32 in hex and a JSON object. What was cut off or damaged, and all after it, is dropped on opening.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sdpnet.pipelines.files.atomic_write import write_all
from sdpnet.pipelines.shards.manifest import Split, parse_split
from sdpnet.preprocess.conversion.writers.records import not_ours, open_plain

__all__ = [
    "JOURNAL_NAME",
    "BadImage",
    "Begun",
    "Commit",
    "Entry",
    "Finished",
    "Journal",
    "Published",
    "finished_split",
    "is_published",
    "last_commit",
    "quarantined",
    "read_journal",
]

JOURNAL_NAME: Final = "journal.jsonl"
_MAX_LINE: Final = 1 << 27  # bytes; the names of a million classes take a tenth of that


@dataclass(frozen=True)
class Begun:
    """The first entry: what is converted, and into what.

    Attributes:
        conversion: `Conversion.identity()`.
        output: describes the writer, where a whole shard set is made.
        part: the folder's name, where one part of it is made.
        origin: `Conversion.notes()`'s, of the run that began; another run need not have the same.
    """

    conversion: dict[str, Any]
    output: dict[str, Any] | None = None
    part: str | None = None
    origin: dict[str, Any] | None = None

    @property
    def num_parts(self) -> int:
        """How many parts the shard set is merged from; 0 for a conversion without parts."""
        return 0 if self.output is None else int(self.output.get("parts", 0))

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class BadImage:
    """An image that is left out: its number in the split (or in the part's stretch of it), its name, and why."""

    index: int
    file: str
    reason: str


@dataclass(frozen=True)
class Commit:
    """Of a split, `count` images have reached the disk, and their records, whose bytes have this CRC-32.

    `bad` are the bad ones among those since the commit before. A kill may have one of them listed twice.
    """

    split: str
    count: int
    crc32: int
    bad: tuple[BadImage, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "bad": [asdict(image) for image in self.bad]}


@dataclass(frozen=True)
class Finished:
    """All of a split is written, and `result` is what the manifest says of it."""

    split: str
    result: Split

    def to_dict(self) -> dict[str, Any]:
        return {"split": self.split, "finished": self.result.to_dict()}


@dataclass(frozen=True)
class Published:
    """All splits are written, and the files with these names get their final place from here on."""

    names: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"published": list(self.names)}


Entry = Begun | Commit | Finished | Published


def _parse(raw: dict[str, Any]) -> Entry:
    """What an entry's `to_dict` gave. Raises KeyError, TypeError, ValueError or AttributeError for anything else."""
    if "published" in raw:
        return Published(tuple(raw["published"]))
    if "finished" in raw:
        return Finished(raw["split"], parse_split(raw["finished"]))
    if "split" in raw:
        bad = tuple(BadImage(**image) for image in raw.get("bad", ()))
        return Commit(raw["split"], raw["count"], raw["crc32"], bad)
    return Begun(**raw)


def last_commit(entries: Iterable[Entry], split: str) -> Commit:
    """How far a split is; nothing of it is done where there is no commit."""
    commits = [entry for entry in entries if isinstance(entry, Commit) and entry.split == split]
    return commits[-1] if commits else Commit(split, 0, 0)


def finished_split(entries: Iterable[Entry], split: str) -> Split | None:
    """What the manifest says of a split that is finished."""
    results = (entry.result for entry in entries if isinstance(entry, Finished) and entry.split == split)
    return next(results, None)


def is_published(entries: Iterable[Entry]) -> bool:
    """Whether files may have got their final place already."""
    return any(isinstance(entry, Published) for entry in entries)


def quarantined(entries: Iterable[Entry], split: str) -> dict[int, BadImage]:
    """The bad images of a split by their number, in the order of the journal."""
    commits = (entry for entry in entries if isinstance(entry, Commit) and entry.split == split)
    return {image.index: image for commit in commits for image in commit.bad}


def read_journal(path: Path) -> tuple[list[Entry], int]:
    """The entries of a journal and the bytes that they take; nothing when there is no such file.

    Raises `UserError` for what no conversion has written.
    """
    entries: list[Entry] = []
    end = 0
    if os.path.lexists(path):
        with open_plain(path) as file:
            while line := file.readline(_MAX_LINE):
                checksum, _, text = line.partition(b" ")
                if len(line) == _MAX_LINE:
                    raise not_ours(path)
                if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                    break
                try:
                    entries.append(_parse(json.loads(text)))
                except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                    raise not_ours(path) from None
                end += len(line)
    return entries, end


class Journal:
    """An append-only list of entries; `append` returns when its entry is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, end = read_journal(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._file, end)
        self._end = end

    def append(self, entry: Entry) -> None:
        text = json.dumps(entry.to_dict(), sort_keys=True).encode() + b"\n"
        line = b"%08x %s" % (zlib.crc32(text), text)
        write_all(self._file, line, self._end)
        os.fsync(self._file)
        self._end += len(line)
        self.entries.append(entry)

    def close(self) -> None:
        os.close(self._file)
