"""The engine of a conversion: writes images in order, so that a run that was killed can be continued.

images (encoded, or read from parts)  ->  writer (.beton, tars, or one part)  ->  OUT/.unfinished
every second: data and records are flushed to the disk, then a line is appended to the journal
at the end: all files get their final names, the manifest last; then OUT/.unfinished is removed
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
    """One image of the source.

    Attributes:
        label: its label.
        result: the encoded image, or the reason why it is bad.
        names: returns its name below the source and its name in messages. It is a function because only the names of
            bad images are needed.
    """

    label: int
    result: Encoded | Bad
    names: Callable[[], tuple[str, str]]


# Called with the name of a split and an index; yields the images of the split from this index on.
ImageSource = Callable[[str, int], Generator[Image, None, None]]


class Writer(Protocol):
    """Writes the images of a split; see `sdpnet.preprocess.conversion.writers.beton.BetonWriter`."""

    format: str

    def __enter__(self) -> Writer: ...
    def __exit__(self, *error: Any) -> None: ...
    def resume(self, sizes: Iterable[int]) -> None: ...
    def add(self, image: bytes | memoryview, label: int) -> None: ...
    def sync(self) -> None: ...
    def finish(self, records: Records) -> tuple[ShardFile, ...]: ...


# Makes the writer of a split. The arguments are directory, split and num_images.
MakeWriter = Callable[[Path, str, int], Writer]


def convert(
    conversion: Conversion,
    images: ImageSource,
    make_writer: MakeWriter,
    output: dict[str, Any],
    out: str | os.PathLike[str],
    on_bad: OnBad = "fail",
) -> Manifest:
    """Writes a whole shard set, or continues an earlier call that was interrupted. Progress is printed to stderr.

    All files get their final names together at the very end, the manifest last. Their bytes depend only on
    `conversion`, `output` and the images.

    Args:
        conversion: what is converted.
        images: the source of the encoded images.
        make_writer: makes the writer of a split.
        output: a description of the writer, as JSON, by which unfinished conversions are distinguished. It has the key
            "parts" if the images are read from the parts in OUT/.unfinished.
        out: the folder of the shard set. It is made if it does not exist.
        on_bad: how to treat an image that cannot be converted. "fail" ends the conversion; "skip" skips the image and
            lists it in `quarantine.jsonl`, which has a JSON object with split, file and reason in each line.

    Raises:
        UserError: `out` has another shard set, finished or not; another process writes there; an image is bad
            ("fail"); all images of a split are bad; or the disk cannot be written. The finished work stays in
            OUT/.unfinished, and the same call continues it.
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
    """Converts the splits that are not finished according to the journal, one after the other."""
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
    """Converts a split, or the rest of it.

    The last commit in the journal gives the number of images that are certainly on the disk. Their records have the
    sizes of the encoded images, from which the writer computes where the next image goes. Everything beyond that may
    be incomplete and is cut off.
    """
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
                    raise UserError(f"{full_name}: {result.reason} (pass --on-bad skip to skip such images)")
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
    """Raises `UserError` if a published file is missing or was changed, since an earlier run may have published it."""
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

    A kill may come between any two steps, and the same command must then finish the work. The order makes this
    possible:

    1. The journal gets the names before the first file is renamed. A later run thereby knows that files with these
       names in `out` are its own, and does not refuse them as the files of another shard set.
    2. The files are renamed. A later run renames those that are still in `work`.
    3. The list of bad images and then the manifest are written. A folder without a manifest is not a shard set, so
       that no reader sees an incomplete one.
    4. The contents of `work` are removed, the journal last: as long as it exists, the command can be repeated.

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
