"""Command: converts an image folder into a shard set of `.beton` files.

    python preprocess/build_ffcv.py --source IMAGENET --out SHARDS

    IMAGENET/{train,val}/CLASS/*.jpg  ->  SHARDS/{train,val}.beton, SHARDS/manifest.json

Every image is found in SHARDS, or the command ends with the name of the one that cannot be converted. With `--on-bad
skip` it goes on, and SHARDS/quarantine.jsonl lists each such file with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Final, Literal

if not __package__:  # run as a file: import from the checkout, and nothing by its bare name from this folder
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.errors import UserError, run_command
from pipelines.layout import MANIFEST_NAME, Manifest, Split
from pipelines.publish import exclusive, publish_bytes
from preprocess.beton import BetonWriter
from preprocess.encode import SUBSAMPLINGS, EncodedImage, EncodeSettings, codec, encode_split
from preprocess.scan import Scan, scan

__all__ = ["QUARANTINE_NAME", "build_ffcv", "main"]

QUARANTINE_NAME: Final = "quarantine.jsonl"


def build_ffcv(
    found: Scan,
    out: str | os.PathLike[str],
    source: str,
    settings: EncodeSettings,
    num_workers: int,
    on_bad: Literal["fail", "skip"] = "fail",
) -> Manifest:
    """Converts all splits of a scanned image folder and writes the shard set's files and manifest.

    All files get their final names together, at the very end, and the manifest comes last. Their bytes do not
    depend on `num_workers`. Progress goes to stderr.

    Args:
        found: what `scan` returned.
        out: the shard set's folder; made when it is not there.
        source: the manifest's name for where the images came from.
        settings: how images are stored.
        num_workers: threads that decode and encode.
        on_bad: what an image that cannot be converted does: "fail" ends the conversion, "skip" leaves it out and
            lists it in `quarantine.jsonl`, a JSON object a line: split, file (below the split's folder), reason.

    Raises:
        UserError: when `out` already has files of these names, a disk error occurs, for the first image that cannot
            be converted ("fail"), or for a split of which none can. Nothing of a final name is left then.
    """
    out = Path(out)
    try:
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive(out):
                return _write(found, out, source, settings, num_workers, on_bad)
        except BaseException:
            if made and not any(out.iterdir()):
                out.rmdir()
            raise
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None


def _write(
    found: Scan, out: Path, source: str, settings: EncodeSettings, num_workers: int, on_bad: Literal["fail", "skip"]
) -> Manifest:
    _refuse_existing(out, found.splits)
    splits = {}
    quarantine: list[str] = []
    with ExitStack() as stack:
        writers = []
        for name, split in found.splits.items():
            writer = stack.enter_context(BetonWriter(out / f"{name}.beton", split.num_images))
            encoded = stack.enter_context(closing(encode_split(split, settings, num_workers)))
            num_bad = 0
            with _Meter(name, split.num_images) as meter:
                for index, image in enumerate(encoded):
                    if isinstance(image, EncodedImage):
                        writer.add(image, int(split.labels[index]), split.path(index))
                    elif on_bad == "fail":
                        raise image
                    else:
                        writer.skip()
                        num_bad += 1
                        reason = str(image).removeprefix(f"{split.path(index)}: ")
                        entry = {"split": name, "file": split.relative_path(index), "reason": reason}
                        quarantine.append(json.dumps(entry) + "\n")
                    meter.advance(num_bad)
                if num_bad == split.num_images:
                    raise UserError(f"{split.root}: none of its {num_bad:,} images can be converted; the last: {image}")
                meter.note("waiting for the disk, checksum")
                shard = writer.finish()
            splits[name] = Split(shard.num_samples, "beton", (shard,), num_bad)
            writers.append(writer)
        manifest = Manifest(source, found.classes, asdict(settings), splits, f"preprocess.build_ffcv, {codec()}")
        try:
            for writer in writers:
                writer.publish()
            if quarantine:
                publish_bytes(out / QUARANTINE_NAME, "".join(quarantine).encode())
            publish_bytes(out / MANIFEST_NAME, manifest.to_json().encode())
        except BaseException:
            for writer in writers:
                writer.path.unlink(missing_ok=True)
                writer.crc32_path.unlink(missing_ok=True)
            (out / QUARANTINE_NAME).unlink(missing_ok=True)
            raise
    return manifest


def _refuse_existing(out: Path, names: Iterable[str]) -> None:
    if (out / MANIFEST_NAME).exists():
        raise UserError(f"{out}: already holds a shard set; remove it, or choose another --out")
    for name in names:
        if (out / f"{name}.beton").exists():
            raise UserError(f"{out / name}.beton: exists already; remove it, or choose another --out")


class _Meter:
    """Progress of one split on stderr: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._began = self._shown = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            note = TextColumn("{task.fields[note]}")
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                note,
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(name, total=total, note="")

    def __enter__(self) -> _Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bad: int) -> None:
        self._done += 1
        bad = f", {num_bad:,} bad" if num_bad else ""
        now = time.monotonic()
        if now - self._shown < (10 if self._bar is None else 0.1) and self._done < self._total:
            return
        self._shown = now
        rate = self._done / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=f"{rate:,.0f} images/s{bad}")
        else:
            left = _duration((self._total - self._done) / rate)
            line = f"{self._name}: {self._done:,} of {self._total:,} images, {rate:,.0f} images/s{bad}, {left} left"
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=text)
        else:
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _summary(found: Scan, manifest: Manifest, out: Path, seconds: float) -> str:
    lines = [f"{out}: {manifest.num_classes:,} classes"]
    for name, split in manifest.splits.items():
        scanned = found.splits[name]
        counts = f"{scanned.num_images:,} images found, {split.num_samples:,} converted"
        if split.num_quarantined:
            counts += f", {split.num_quarantined:,} bad ({out / QUARANTINE_NAME} says why)"
        size = sum(file.bytes for file in split.files)
        ignored = f"; {scanned.num_ignored:,} other files and folders left out" if scanned.num_ignored else ""
        lines.append(f"  {name + ':':6} {counts}, {size:,} bytes{ignored}")
    total = sum(split.num_samples for split in manifest.splits.values())
    lines.append(f"  {total:,} images in {seconds:,.1f} s, {total / seconds:,.0f} images/s")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    defaults = EncodeSettings()
    description = "Converts an image folder into a shard set of .beton files."
    parser = argparse.ArgumentParser(prog="build_ffcv", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--source", metavar="DIR", help="holds train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg")
    add("--out", metavar="DIR", required=True, help="where the shard set goes")
    add("--train", metavar="DIR", help="class folders of the train split, instead of SOURCE/train")
    add("--val", metavar="DIR", help="class folders of the val split, instead of SOURCE/val")
    side = "reduce the longer side to this many pixels; 0 keeps every size (default: %(default)s)"
    add("--max-side", metavar="N", type=int, default=defaults.max_side, help=side)
    quality = "of the JPEGs, 1 to 100 (default: %(default)s)"
    add("--quality", metavar="N", type=int, default=defaults.quality, help=quality)
    subsampling = "chroma of the JPEGs; 4:4:4 keeps small images sharp (default: %(default)s)"
    add("--subsampling", choices=SUBSAMPLINGS, default=defaults.subsampling, help=subsampling)
    on_bad = "an image that cannot be converted ends the conversion, or is left out and listed (default: %(default)s)"
    add("--on-bad", choices=["fail", "skip"], default="fail", help=on_bad)
    add("--workers", metavar="N", type=int, help="threads (default: one for each CPU core)")
    return parser


def _main(arguments: argparse.Namespace) -> None:
    # Of large images that are not too large, and of damaged EXIF data: they would garble the progress.
    warnings.filterwarnings("ignore", module="PIL")
    workers = arguments.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    settings = EncodeSettings(arguments.max_side, arguments.quality, arguments.subsampling)
    out = Path(arguments.out)
    _refuse_existing(out, ())  # before the scan, which takes minutes for millions of files
    began = time.monotonic()
    found = scan(arguments.source, arguments.train, arguments.val)
    source = Path(arguments.source if arguments.source is not None else arguments.train).absolute().name
    manifest = build_ffcv(found, out, source, settings, workers, arguments.on_bad)
    print(_summary(found, manifest, out, time.monotonic() - began))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _main(arguments))


if __name__ == "__main__":
    sys.exit(main())
