"""The messages of a build command: notes on the source before the work, and a summary at the end."""

from __future__ import annotations

import sys
from pathlib import Path

from sdpnet.pipelines.errors import printable
from sdpnet.pipelines.shards.manifest import QUARANTINE_NAME, Manifest
from sdpnet.pipelines.shards.origin import LeftOut
from sdpnet.preprocess.sources.scan import Scan
from sdpnet.preprocess.sources.splits import named_test

__all__ = ["notes", "print_line", "summary"]

_NO_VAL = "no val split for the evaluation of the model: name its images with --val FOLDER"


def print_line(text: str) -> None:
    """Prints to stdout. Characters that its encoding does not have are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def notes(found: Scan, source: str | None) -> list[str]:
    """The notes before the work: the place of each split, the files that are not converted, and a missing val split.

    The places are omitted if the source consists of only train/ and val/.
    """
    origin = found.origin
    lines = []
    if origin.left_out or origin.val_share is not None or len(found.splits) == 1:
        for name, split in found.splits.items():
            lines.append(f"{name}: {split.num_images:,} images {printable(origin.place(name))}")
    lines += _left_out(origin.left_out)
    if "val" not in found.splits:
        test = None if source is None else named_test(Path(source))
        example = "" if test is None else f" (such as --val {printable(test)})"
        lines.append(f"{_NO_VAL}{example}, or draw some from train with --val-share 0.05")
    return lines


def summary(manifest: Manifest, out: Path, seconds: float) -> str:
    """The summary of a conversion: a line for each split, the files that are not converted by kind, and a balance of
    all files of the source."""
    lines = [f"{printable(out)}: {manifest.num_classes:,} classes"]
    origin = manifest.origin
    for name, split in manifest.splits.items():
        found = split.num_samples + split.num_quarantined
        counts = f"{found:,} images found, {split.num_samples:,} converted"
        if split.num_kept:
            counts += f" ({split.num_kept:,} without loss)"
        if split.num_quarantined:
            counts += f", {split.num_quarantined:,} bad ({printable(out / QUARANTINE_NAME)} says why)"
        size = sum(file.bytes for file in split.files)
        place = "" if origin is None else f", {printable(origin.place(name))}"
        lines.append(f"  {name + ':':6} {counts}, {size:,} bytes{place}")
    total = sum(split.num_samples for split in manifest.splits.values())
    if origin is not None:
        lines += [f"  {line}" for line in _left_out(origin.left_out)]
        bad = sum(split.num_quarantined for split in manifest.splits.values())
        every = total + bad + origin.num_left_out
        lines.append(f"  {every:,} files found = {total:,} converted + {bad:,} bad + {origin.num_left_out:,} left out")
    if "val" not in manifest.splits:
        lines.append(f"  {_NO_VAL}, or draw some from train with --val-share 0.05, and convert again")
    lines.append(f"  {total:,} images in {seconds:,.1f} s, {total / seconds:,.0f} images/s")
    return "\n".join(lines)


def _left_out(left_out: tuple[LeftOut, ...]) -> list[str]:
    if not left_out:
        return []
    total = sum(entry.count for entry in left_out)
    noun = "file is" if total == 1 else "files are"
    return [f"{total:,} other {noun} left out:", *(f"  {printable(str(entry))}" for entry in left_out)]
