"""The append-only journal of a conversion, which says how many images are safely on the disk.

    NAME.records     one `RECORD_DTYPE` record for each image, in the order of the source
    journal.jsonl    one line for each `Entry`: first what is converted, then what is done

A line is a CRC-32 in hex and a JSON object. A kill or a power failure may leave the last line incomplete or damaged,
which the checksum shows: the first line with a wrong checksum and all lines after it are dropped when the journal is
opened. Earlier lines are never changed, so that what was recorded as done stays recorded.
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
from sdpnet.preprocess.conversion.writers.records import foreign_file, open_plain

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
_MAX_LINE: Final = 1 << 27  # bytes; the names of a million classes take a tenth of this


@dataclass(frozen=True)
class Begun:
    """The first entry: what is converted, and into what.

    Attributes:
        conversion: `Conversion.identity()`.
        output: a description of the writer, if a whole shard set is made.
        part: the name of the folder, if a part is made.
        origin: the conversion's `Origin` as a dictionary. It is that of the run that began; a run that continues it may
            have another one.
    """

    conversion: dict[str, Any]
    output: dict[str, Any] | None = None
    part: str | None = None
    origin: dict[str, Any] | None = None

    @property
    def num_parts(self) -> int:
        """The number of parts from which the shard set is merged; 0 for a conversion without parts."""
        return 0 if self.output is None else int(self.output.get("parts", 0))

    def to_dict(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class BadImage:
    """An image that is skipped.

    Attributes:
        index: its number in the split, or in the part's range of the split.
        file: its name below the source.
        reason: why it cannot be converted.
    """

    index: int
    file: str
    reason: str


@dataclass(frozen=True)
class Commit:
    """The first `count` images of a split and their records are on the disk.

    Attributes:
        split: the name of the split.
        count: the number of images, including bad ones.
        crc32: the CRC-32 of the bytes of their records.
        bad: the bad images since the previous commit. After an interrupt, one may be listed twice.
    """

    split: str
    count: int
    crc32: int
    bad: tuple[BadImage, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return {**vars(self), "bad": [asdict(image) for image in self.bad]}


@dataclass(frozen=True)
class Finished:
    """A split is completely written. `result` is its entry in the manifest."""

    split: str
    result: Split

    def to_dict(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return {"split": self.split, "finished": self.result.to_dict()}


@dataclass(frozen=True)
class Published:
    """All splits are written, and the files with these names may have been renamed to their final places."""

    names: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The entry as a JSON object."""
        return {"published": list(self.names)}


Entry = Begun | Commit | Finished | Published


def _parse(raw: dict[str, Any]) -> Entry:
    """The inverse of `to_dict` of an entry.

    Raises KeyError, TypeError, ValueError or AttributeError if `raw` is not such a dictionary.
    """
    if "published" in raw:
        return Published(tuple(raw["published"]))
    if "finished" in raw:
        return Finished(raw["split"], parse_split(raw["finished"]))
    if "split" in raw:
        bad = tuple(BadImage(**image) for image in raw.get("bad", ()))
        return Commit(raw["split"], raw["count"], raw["crc32"], bad)
    return Begun(**raw)


def last_commit(entries: Iterable[Entry], split: str) -> Commit:
    """The last commit of a split; one with a count of 0 if there is none."""
    commits = [entry for entry in entries if isinstance(entry, Commit) and entry.split == split]
    return commits[-1] if commits else Commit(split, 0, 0)


def finished_split(entries: Iterable[Entry], split: str) -> Split | None:
    """The manifest's entry for a split; None if the split is not finished."""
    results = (entry.result for entry in entries if isinstance(entry, Finished) and entry.split == split)
    return next(results, None)


def is_published(entries: Iterable[Entry]) -> bool:
    """Whether files may have been renamed to their final places."""
    return any(isinstance(entry, Published) for entry in entries)


def quarantined(entries: Iterable[Entry], split: str) -> dict[int, BadImage]:
    """The bad images of a split by their index, in the order of the journal."""
    commits = (entry for entry in entries if isinstance(entry, Commit) and entry.split == split)
    return {image.index: image for commit in commits for image in commit.bad}


def read_journal(path: Path) -> tuple[list[Entry], int]:
    """Reads the entries of a journal and their size in bytes; ([], 0) if there is no such file.

    Raises:
        UserError: the file was not written by a conversion.
    """
    entries: list[Entry] = []
    end = 0
    if os.path.lexists(path):
        with open_plain(path) as file:
            while line := file.readline(_MAX_LINE):
                checksum, _, text = line.partition(b" ")
                if len(line) == _MAX_LINE:
                    raise foreign_file(path)
                if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
                    break
                try:
                    entries.append(_parse(json.loads(text)))
                except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                    raise foreign_file(path) from None
                end += len(line)
    return entries, end


class Journal:
    """An append-only list of entries. `append` returns when the entry is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, end = read_journal(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._file, end)
        self._end = end

    def append(self, entry: Entry) -> None:
        """Appends an entry and waits until it is on the disk."""
        text = json.dumps(entry.to_dict(), sort_keys=True).encode() + b"\n"
        line = b"%08x %s" % (zlib.crc32(text), text)
        write_all(self._file, line, self._end)
        os.fsync(self._file)
        self._end += len(line)
        self.entries.append(entry)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
