"""The engine of a conversion: images in order -> a writer, so that a run which was killed goes on where it was.

images (encoded, or read back from parts) -> writer (.beton, tars, or one part) -> OUT/.unfinished
                                    every second: data and records to disk, then a line of the journal
all files of the set under their final names, the manifest last; OUT/.unfinished goes
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish, publish_bytes, sync_directory
from sdpnet.pipelines.shards.layout import sha256_of
from sdpnet.pipelines.shards.manifest import (
    FORMATS,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    UNFINISHED_NAME,
    Manifest,
    ShardFile,
    Split,
)
from sdpnet.preprocess.conversion.committer import Committer
from sdpnet.preprocess.conversion.identity import Conversion
from sdpnet.preprocess.conversion.journal import (
    JOURNAL_NAME,
    BadImage,
    Finished,
    Journal,
    Published,
    finished_split,
    is_published,
    last_commit,
    quarantined,
)
from sdpnet.preprocess.conversion.progress import Meter
from sdpnet.preprocess.conversion.unfinished import LOCK_NAME, open_journal, refuse_existing, writing
from sdpnet.preprocess.conversion.writers.records import Records
from sdpnet.preprocess.workers.result import Bad, Encoded, ImageState

__all__ = ["Image", "Writer", "convert", "run_splits"]

OnBad = Literal["fail", "skip"]


class Image(NamedTuple):
    """One image of the source: its label, what became of it, and, when called, its names: below the source, and what an
    error calls it."""

    label: int
    result: Encoded | Bad
    names: Callable[[], tuple[str, str]]


# Yields the images of a split from the given one on.
ImageSource = Callable[[str, int], Generator[Image, None, None]]


class Writer(Protocol):
    """What a conversion writes into; see `sdpnet.preprocess.conversion.writers.beton.BetonWriter`."""

    format: str

    def __enter__(self) -> Writer: ...
    def __exit__(self, *error: Any) -> None: ...
    def resume(self, sizes: Iterable[int]) -> None: ...
    def add(self, image: bytes | memoryview, label: int) -> None: ...
    def sync(self) -> None: ...
    def finish(self, records: Records) -> tuple[ShardFile, ...]: ...


# Makes the writer of a split: (directory, split, num_images).
MakeWriter = Callable[[Path, str, int], Writer]


def convert(
    conversion: Conversion,
    images: ImageSource,
    make_writer: MakeWriter,
    output: dict[str, Any],
    out: str | os.PathLike[str],
    on_bad: OnBad = "fail",
) -> Manifest:
    """Writes a whole shard set, or what an earlier, interrupted call left to do of it. Progress goes to stderr.

    All files get their final names together, at the very end, and the manifest comes last. Their bytes depend on
    `conversion`, `output` and the images alone.

    Args:
        conversion: what is converted.
        images: gives the images of a split, from any one on.
        make_writer: makes the writer of a split.
        output: describes the writer, for telling one unfinished conversion from another; JSON. It has the key "parts"
            where the images are read from the parts in OUT/.unfinished.
        out: the shard set's folder; made when it is not there.
        on_bad: what an image that cannot be converted does: "fail" ends the conversion, "skip" leaves it out and
            lists it in `quarantine.jsonl`, a JSON object a line: split, file, reason.

    Raises:
        UserError: when `out` holds another shard set, finished or not, or another process writes there; for the first
            bad image ("fail"); for a split of bad images only; when the disk refuses. What was done until then stays
            in OUT/.unfinished, and the same call goes on from there.
    """
    out = Path(out)
    with writing(out / UNFINISHED_NAME) as work:
        if not (work / JOURNAL_NAME).exists():
            refuse_existing(out, conversion.num_images)
            if "parts" not in output and any(work.glob("part-*")):
                raise UserError(f"{work}: parts lie here; finish and --merge them, or remove them")
        with closing(open_journal(work, conversion.begun(output=output))) as journal:
            splits = run_splits(conversion.num_images, images, make_writer, work, journal, on_bad)
            manifest = Manifest(
                conversion.source,
                conversion.classes,
                conversion.encode,
                splits,
                conversion.created_by,
                origin=conversion.origin,
            )
            return _publish(manifest, journal, work, out)


def run_splits(
    num_images: dict[str, int],
    images: ImageSource,
    make_writer: MakeWriter,
    work: Path,
    journal: Journal,
    on_bad: OnBad,
) -> dict[str, Split]:
    """Converts what the journal does not say is done, split after split."""
    splits = {}
    for name, count in num_images.items():
        done = finished_split(journal.entries, name)
        if done is None:
            done = _run_split(name, count, images, make_writer, work, journal, on_bad)
            journal.append(Finished(name, done))
        splits[name] = done
    return splits


def _run_split(
    name: str,
    count: int,
    images: ImageSource,
    make_writer: MakeWriter,
    work: Path,
    journal: Journal,
    on_bad: OnBad,
) -> Split:
    done = last_commit(journal.entries, name)
    with ExitStack() as stack:
        records = stack.enter_context(closing(Records(work / f"{name}.records", done.count, done.crc32)))
        writer = stack.enter_context(make_writer(work, name, count))
        writer.resume(
            size for piece in records.pieces() for size in piece["size"][piece["state"] != ImageState.BAD].tolist()
        )
        states = np.zeros(max(ImageState) + 1, np.int64)
        for piece in records.pieces():
            states += np.bincount(piece["state"], minlength=len(states))
        num_bad, num_kept = int(states[ImageState.BAD]), int(states[ImageState.KEPT])
        committer = stack.enter_context(Committer(name, writer.sync, records, journal))
        source = stack.enter_context(closing(images(name, records.count)))
        meter = stack.enter_context(Meter(name, records.count, count))
        for image in source:
            result = image.result
            if isinstance(result, Encoded):
                try:
                    writer.add(result.data, image.label)
                except UserError as error:
                    result = Bad(str(error))
            if isinstance(result, Encoded):
                num_kept += result.kept
                record = (len(result.data), result.crc32, image.label, result.height, result.width, result.state)
            else:
                file, full_name = image.names()
                if on_bad == "fail":
                    raise UserError(f"{full_name}: {result.reason} (--on-bad skip would leave it out)")
                num_bad += 1
                record = (0, 0, image.label, 0, 0, ImageState.BAD)
                committer.bad.append(BadImage(records.count, file, result.reason))
            records.append(record)
            committer.tick()
            meter.advance(num_bad)
        committer.commit()
        if num_bad == count and writer.format in FORMATS:
            last = list(quarantined(journal.entries, name).values())[-1]
            reason = f"{last.file}: {last.reason}"
            raise UserError(f"{name}: none of its {num_bad:,} images can be converted; the last: {reason}")
        meter.note("waiting for the disk")
        files = writer.finish(records)
        sync_directory(work)
    return Split(records.count - num_bad, writer.format, files, num_bad, num_kept)


def _require_published(out: Path, file: ShardFile) -> None:
    """Raises `UserError` when a file that this run or an earlier one has published is not there, or is another one."""
    for name in (file.name, *file.sidecars):
        path = out / name
        if not path.is_file():
            wrong = "was removed"
        elif name == file.name and path.stat().st_size != file.bytes:
            wrong = f"has {path.stat().st_size:,} bytes, not {file.bytes:,}: it was changed"
        elif name != file.name and sha256_of(path) != file.sidecars[name]:
            wrong = "was changed"
        else:
            continue
        raise UserError(
            f"{path}: {wrong} after the conversion gave it its name; put it back, or remove {out / UNFINISHED_NAME} "
            "and the set's other files beside it, and convert again"
        )


def _publish(manifest: Manifest, journal: Journal, work: Path, out: Path) -> Manifest:
    """Gives all files their final names, the manifest last, and removes the folder of unfinished work.

    Returns the manifest as it was written.
    """
    names = [name for split in manifest.splits.values() for file in split.files for name in (*file.sidecars, file.name)]
    if not is_published(journal.entries):
        for name in names:
            if (out / name).exists():
                raise UserError(f"{out / name}: exists already; remove it, or choose another --out")
        journal.append(Published(tuple(names)))
    for name in names:
        if (work / name).exists():
            publish(out / name, work / name)
    for split in manifest.splits.values():
        for file in split.files:
            _require_published(out, file)
    lines = [
        json.dumps({"split": split, "file": image.file, "reason": image.reason}) + "\n"
        for split in manifest.splits
        for image in quarantined(journal.entries, split).values()
    ]
    if lines:
        quarantine = "".join(lines).encode()
        publish_bytes(out / QUARANTINE_NAME, quarantine)
        manifest = replace(manifest, quarantine_sha256=hashlib.sha256(quarantine).hexdigest())
    publish_bytes(out / MANIFEST_NAME, manifest.to_json().encode())
    for entry in sorted(os.listdir(work)):
        if entry.partition(".")[0] != LOCK_NAME and entry != JOURNAL_NAME:
            (shutil.rmtree if (work / entry).is_dir() else os.unlink)(work / entry)
    os.unlink(work / JOURNAL_NAME)
    return manifest
