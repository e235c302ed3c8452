"""Conversion on several machines: each converts a part, then the parts are merged to a shard set.

    OUT/.unfinished/part-3-of-8/   SPLIT.spool    the encoded images of the part, one after the other
                                   SPLIT.records  their sizes, labels and checksums
                                   journal.jsonl  the journal, as in any conversion

A part is a contiguous range of each split. The parts one after the other are the images in the order of a single
conversion, so that a merge gives the same bytes as one machine would. A part does not depend on the format of the
shards: it has only the encoded images, because the position of an image in a shard depends on all images before it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zlib_ng import zlib_ng

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.manifest import UNFINISHED_NAME, Manifest
from sdpnet.preprocess.conversion.convert import Image, ImageSource, MakeWriter, OnBad, convert, run_splits
from sdpnet.preprocess.conversion.identity import Conversion
from sdpnet.preprocess.conversion.journal import (
    JOURNAL_NAME,
    Begun,
    Entry,
    finished_split,
    is_published,
    last_commit,
    quarantined,
    read_journal,
)
from sdpnet.preprocess.conversion.unfinished import open_journal, refuse_existing, writing
from sdpnet.preprocess.conversion.writers.records import Records, open_plain
from sdpnet.preprocess.conversion.writers.spool import SpoolWriter
from sdpnet.preprocess.workers.result import Bad, Encoded, ImageState

__all__ = ["Part", "convert_part", "merge"]


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, counted from 1. Raises `UserError` if the number is out of range."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            at = f"part {self.number}/{self.count}"
            raise UserError(f"{at}: parts are numbered from 1 to their count, as in 1/8 to 8/8")

    @staticmethod
    def parse(text: str) -> Part:
        """Parses a text such as "3/8"."""
        if not re.fullmatch(r"\d+/\d+", text):
            raise UserError(f"part {text!r}: must be a number and a count, such as 3/8")
        number, count = map(int, text.split("/"))
        return Part(number, count)

    @property
    def folder(self) -> str:
        """The name of the folder of the part."""
        return f"part-{self.number}-of-{self.count}"

    def image_range(self, num_images: int) -> tuple[int, int]:
        """The index of the first image of the part in a split, and that of the first image after it."""
        return num_images * (self.number - 1) // self.count, num_images * self.number // self.count


def convert_part(
    conversion: Conversion, images: ImageSource, part: Part, out: str | os.PathLike[str], on_bad: OnBad = "fail"
) -> int:
    """Converts one part, or continues an earlier call that was interrupted. Returns its number of images.

    Args:
        conversion: the conversion of all parts together.
        images: the source of the encoded images of this part; indices count from the part's first image.
        part: the part to convert.
        out: the folder of the shard set, the same for all parts.
        on_bad: see `convert`.

    Raises:
        UserError: as in `convert`, and if `out` has parts of another conversion or of another count.
    """
    out = Path(out)
    unfinished = out / UNFINISHED_NAME
    ranges = {name: part.image_range(count) for name, count in conversion.num_images.items()}
    num_images = {name: end - start for name, (start, end) in ranges.items()}
    with writing(unfinished / part.folder) as work:
        entries, _ = read_journal(unfinished / JOURNAL_NAME)
        if is_published(entries):
            raise UserError(f"{unfinished}: a merge of all parts was interrupted here; repeat --merge to finish it")
        refuse_existing(out, conversion.num_images)
        if entries and not _begun(entries, unfinished).num_parts:
            raise UserError(f"{unfinished}: an unfinished conversion without parts lies here; go on with that")
        for other in _parts(unfinished):
            if other.count != part.count:
                raise UserError(
                    f"{unfinished}: has {other.folder}, so this cannot be {part.number}/{part.count}; "
                    "give all parts the same count, or remove that folder to start over"
                )
        with closing(open_journal(work, conversion.begun(part=part.folder))) as journal:
            run_splits(num_images, images, SpoolWriter, work, journal, on_bad)
    return sum(num_images.values())


def merge(make_writer: MakeWriter, output: dict[str, Any], out: str | os.PathLike[str]) -> Manifest:
    """Merges all parts in `out` to a shard set. The bytes are the same as those of a conversion without parts.

    Args:
        make_writer, output, out: see `convert`.

    Raises:
        UserError: as in `convert`, and if parts are missing, unfinished, damaged, or of another conversion. The message
            names them.
    """
    out = Path(out)
    unfinished = out / UNFINISHED_NAME
    entries, _ = read_journal(unfinished / JOURNAL_NAME)
    if entries and not _begun(entries, unfinished).num_parts:
        raise UserError(f"{unfinished}: an unfinished conversion without parts lies here; go on with that")
    if is_published(entries):  # an interrupted merge may have removed the parts; the journal is enough to finish it
        merging = _begun(entries, unfinished)
        output = {**output, "parts": merging.num_parts}
        return convert(Conversion.from_journal(merging), _no_images, make_writer, output, out, "skip")
    parts = _parts(unfinished)
    if not parts:
        with writing(unfinished):  # removes the lock file of a merge that was killed at its very end
            refuse_existing(out)
        raise UserError(f"{unfinished}: no parts are here to merge; convert them with --part 1/N to N/N first")
    count = parts[0].count
    first: Begun | None = None  # the first entry of the first part's journal
    for part in parts:
        folder = unfinished / part.folder
        entries, _ = read_journal(folder / JOURNAL_NAME)
        begun = _begun(entries, folder) if entries else None
        if begun is not None and begun.part != part.folder:
            raise UserError(f"{folder}: holds another part; remove it and convert this part again")
        if begun is None or any(finished_split(entries, split) is None for split in begun.conversion["num_images"]):
            raise UserError(f"{folder}: is not finished; run --part {part.number}/{part.count} again")
        first = first or begun
        if part.count != count:
            raise UserError(f"{unfinished}: has {parts[0].folder} and {part.folder}; remove those that are not wanted")
        if begun.conversion != first.conversion:
            raise UserError(
                f"{unfinished / part.folder}: was made from other images, with other settings or another version of "
                f"the encoder than {parts[0].folder}; remove the wrong one and convert it again"
            )
    missing = sorted(set(range(1, count + 1)) - {part.number for part in parts})
    if missing:
        shown = ", ".join(f"{number}/{count}" for number in missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise UserError(f"{unfinished}: {len(missing)} of {count} parts are missing: {shown}")
    assert first is not None
    conversion = Conversion.from_journal(first)

    def images(split: str, first: int) -> Generator[Image, None, None]:
        for part in parts:
            start, end = part.image_range(conversion.num_images[split])
            if end > first:
                yield from _read_part(unfinished / part.folder, split, max(first - start, 0))

    return convert(conversion, images, make_writer, {**output, "parts": count}, out, "skip")


def _begun(entries: list[Entry], folder: Path) -> Begun:
    """The first entry of a journal. `folder` is the folder of the journal, for the message."""
    if not isinstance(entries[0], Begun):
        raise UserError(f"{folder / JOURNAL_NAME}: was not written by a conversion; remove {folder} to start over")
    return entries[0]


def _no_images(split: str, first: int) -> Generator[Image, None, None]:
    yield from ()


def _names(file: str, name: str) -> tuple[str, str]:
    return file, name


def _parts(unfinished: Path) -> list[Part]:
    found = (re.fullmatch(r"part-(\d+)-of-(\d+)", path.name) for path in unfinished.glob("part-*"))
    return sorted((Part(int(m[1]), int(m[2])) for m in found if m), key=lambda part: (part.count, part.number))


def _read_part(folder: Path, split: str, first: int) -> Iterator[Image]:
    """Yields the images of a finished part, from index `first` of its range on. Each is compared with its CRC-32."""
    entries, _ = read_journal(folder / JOURNAL_NAME)
    bad, done = quarantined(entries, split), last_commit(entries, split)
    offset = index = 0
    with open_plain(folder / f"{split}.spool") as spool, ExitStack() as stack:
        records = Records(folder / f"{split}.records", done.count, done.crc32)
        stack.enter_context(closing(records))
        for piece in records.pieces():
            for size, crc32, label, height, width, state in piece.tolist():
                if index >= first and state == ImageState.BAD:
                    names = partial(_names, bad[index].file, f"{folder.name}, image {index} of {split}")
                    yield Image(label, Bad(bad[index].reason), names)
                elif index >= first:
                    spool.seek(offset)
                    data = spool.read(size)
                    if zlib_ng.crc32(data) != crc32:
                        raise UserError(
                            f"{folder / f'{split}.spool'}: image {index} has changed (CRC-32); remove {folder} and "
                            "convert this part again"
                        )
                    names = partial(_names, "", f"{folder.name}, image {index} of {split}")
                    yield Image(label, Encoded(data, height, width, state == ImageState.KEPT, crc32), names)
                offset += size
                index += 1
