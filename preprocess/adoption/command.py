"""The command that makes a shard set of images where they lie: files and summary."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from sdpnet.pipelines.errors import ShardError, UserError, printable
from sdpnet.pipelines.files.atomic_write import publish, publish_bytes
from sdpnet.pipelines.shards.manifest import (
    MANIFEST_NAME,
    QUARANTINE_NAME,
    UNFINISHED_NAME,
    Manifest,
    read_manifest,
)
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet, training
from sdpnet.preprocess.adoption.index import CONVERTED, Indexed, index_split
from sdpnet.preprocess.adoption.look import Look
from sdpnet.preprocess.adoption.lookers import Lookers
from sdpnet.preprocess.conversion.summary import notes, print_line
from sdpnet.preprocess.conversion.unfinished import refuse_existing, writing
from sdpnet.preprocess.encoding import jpeg
from sdpnet.preprocess.encoding.encode import codec
from sdpnet.preprocess.encoding.settings import EncodeSettings
from sdpnet.preprocess.sources.scan import Scan, scan_arguments
from sdpnet.preprocess.workers.pool import number_of_workers

__all__ = ["index_images", "run"]

_SPLITS: Final = ("train", "val")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed flags and returns the exit status."""
    start_time = time.monotonic()
    workers = number_of_workers(arguments.workers)
    out: Path = arguments.out
    _require_elsewhere(out, arguments)
    _require_free(out, replace=arguments.replace)
    look = Look(arguments.checksums, arguments.decode, arguments.exif)
    with Lookers(look, workers) as lookers:  # they start while the images are listed
        found = scan_arguments(arguments)
        for line in notes(found, arguments.source):
            print_line(line)
        source = Path(arguments.source if arguments.source is not None else arguments.train).absolute().name
        manifest = index_images(found, source, out, lookers, look, on_bad=arguments.on_bad, num_workers=workers)
    print_line(_summary(manifest, out, time.monotonic() - start_time))
    for line in next_lines(*(training(out) or sdpnet("describe", out))):
        print_line(line)
    return 0


def index_images(
    found: Scan,
    source: str,
    out: Path,
    lookers: Lookers,
    look: Look | None = None,
    *,
    on_bad: Any = "fail",
    num_workers: int = 0,
) -> Manifest:
    """Writes the index of each split and the manifest. They get their names together at the end, the manifest last.

    Args:
        found: the images.
        source: the name of the source in the manifest.
        out: the folder of the shard set. It is made if it does not exist. Its index of other images, if any, is
            replaced.
        lookers: the processes that look at the images.
        look: what they look at.
        on_bad: how to treat an image that cannot be used: "fail" or "skip".
        num_workers: the number of processes that convert.

    Raises:
        UserError: as `index_split` does, or another process writes to `out`, or the disk cannot be written. No file is
            left behind.
    """
    look = look or Look()
    settings = EncodeSettings(max_side=0, reencode="auto" if jpeg.available() else "always", exif=look.exif)
    with writing(out / UNFINISHED_NAME) as work:
        indexed = {
            name: index_split(
                name,
                split,
                out,
                work,
                lookers,
                settings,
                num_workers=num_workers,
                checksums=look.checksums,
                on_bad=on_bad,
            )
            for name, split in found.splits.items()
        }
        encode: dict[str, Any] = {"reencode": "in place", "exif": look.exif, "max_side": 0}
        created_by = "no codec: the images are as they were found"
        if any(split.num_converted for split in indexed.values()):
            encode |= {"quality": settings.quality, "subsampling": settings.subsampling}
            created_by = codec()
        return _publish(found, source, encode, created_by, indexed, work, out)


def _publish(
    found: Scan,
    source: str,
    encode: dict[str, Any],
    created_by: str,
    indexed: dict[str, Indexed],
    work: Path,
    out: Path,
) -> Manifest:
    """Gives all files their names, the manifest last. An older manifest is removed first: a kill may come at any time,
    and a folder without a manifest is not a shard set. The same command then starts over."""
    lines = [
        json.dumps({"split": name, "file": file, "reason": reason}) + "\n"
        for name, split in indexed.items()
        for file, reason in split.bad
    ]
    quarantine = "".join(lines).encode()
    manifest = Manifest(
        source,
        found.classes,
        encode,
        {name: split.split for name, split in indexed.items()},
        created_by,
        hashlib.sha256(quarantine).hexdigest() if lines else None,
        origin=found.origin,
    )
    names = [name for split in indexed.values() for file in split.split.files for name in (*file.sidecars, file.name)]
    for name in (MANIFEST_NAME, QUARANTINE_NAME, *(f"{split}{CONVERTED}" for split in _SPLITS)):
        with suppress(FileNotFoundError):
            os.unlink(out / name)
    for name in names:
        publish(out / name, work / name)
    if lines:
        publish_bytes(out / QUARANTINE_NAME, quarantine)
    publish_bytes(out / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _require_elsewhere(out: Path, arguments: argparse.Namespace) -> None:
    """Raises `UserError` if the set would be written into the folder of the images itself."""
    for path in (arguments.source, arguments.train, arguments.val):
        if path is not None and out.exists() and os.path.exists(path) and os.path.samefile(out, path):
            raise UserError(f"--out {out}: is the folder of the images; choose another one, which may lie in it")


def _require_free(out: Path, *, replace: bool) -> None:
    """Raises `UserError` if the folder has another shard set, or an index that is not to be replaced."""
    try:
        is_index = all(split.format == "index" for split in read_manifest(out).splits.values())
    except ShardError:
        is_index = False
    if is_index and not replace:
        raise UserError(
            f"{out}: already holds a shard set of images in place; if they have changed, index them again with "
            "--replace; otherwise choose another --out"
        )
    leftover = any((out / f"{split}.index").exists() for split in _SPLITS)  # of a run that was killed at its end
    if not is_index and not leftover:
        refuse_existing(out, _SPLITS)


def _summary(manifest: Manifest, out: Path, seconds: float) -> str:
    lines = [f"{printable(out)}: {manifest.num_classes:,} classes; the images stay where they are"]
    for name, split in manifest.splits.items():
        counts = f"{split.num_samples:,} images"
        if converted := split.num_samples - split.num_kept:
            counts += f", of which {converted:,} are no plain JPEGs and were converted to {name}{CONVERTED}"
        if split.num_quarantined:
            counts += f", {split.num_quarantined:,} bad ones left out ({printable(out / QUARANTINE_NAME)} says why)"
        place = "" if manifest.origin is None else f", {printable(manifest.origin.place(name))}"
        lines.append(f"  {name + ':':6} {counts}{place}")
    if manifest.origin is not None:
        lines += [f"  left out: {printable(str(entry))}" for entry in manifest.origin.left_out]
    total = sum(split.num_samples for split in manifest.splits.values())
    lines.append(f"  {total:,} images in {seconds:,.1f} s, {total / seconds:,.0f} images/s")
    return "\n".join(lines)
