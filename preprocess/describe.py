"""Command: shows what is in a shard set, in the terminal and as one HTML page: `sdpnet describe SHARDS`

It shows the counts by class, image sizes, bytes, files that were not converted, and a contact sheet: images as stored
beside the same images as training sees them. The command reads the tables of the shards, and only the images of the
contact sheet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

if not __package__:  # run as a file: import sdpnet from the checkout, and no module of this folder by its bare name
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    from sdpnet import preprocess  # noqa: F401 - from here on, Ctrl-C ends the command with one line

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdpnet.pipelines.errors import printable, require
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.pipelines.terminal.next_step import next_lines, training
from sdpnet.preprocess.flags.describe import add_arguments
from sdpnet.preprocess.inspection.contact_sheet import contact_sheet
from sdpnet.preprocess.inspection.page import page
from sdpnet.preprocess.inspection.recipe import CROP, IMAGE_SIZE
from sdpnet.preprocess.inspection.survey import Survey, crop_share, survey
from sdpnet.preprocess.inspection.text import counted, file_size, left_out, left_out_kinds, split_rows
from sdpnet.preprocess.inspection.words import class_counts, how_stored, written_by

__all__ = ["add_arguments", "main", "run"]

REASONS_PRINTED: Final = 5


def _reading(found: Survey, seed: int) -> list[tuple[str, str, str]]:
    """What an epoch of training reads, as (name, value, remark) each; empty if there are no training images."""
    if found.train is None or not found.train.split.num_samples:
        return []
    num_bytes = int(found.train.nbytes.sum())
    share = crop_share(found.train, CROP, IMAGE_SIZE, seed)
    return [
        ("read in an epoch", file_size(num_bytes), "train, every image once"),
        ("kept by the crops", f"{share:.0%}", f"of the bytes: {file_size(share * num_bytes)}"),
    ]


def _print(directory: Path, found: Survey, reading: list[tuple[str, str, str]], html: Path) -> None:
    """Prints the summary: a table of the splits, the largest and smallest classes, and files that are not converted."""
    console = Console(highlight=False, emoji=False, soft_wrap=True)

    def displayable(value: str) -> str:
        return printable(value).encode(console.encoding, "replace").decode(console.encoding)

    def print_line(line: str) -> None:
        console.print(displayable(line), markup=False)

    manifest = found.manifest
    images, classes = counted(found.num_samples, "image", "images"), counted(manifest.num_classes, "class", "classes")
    print_line(f"{manifest.source}: {images}, {classes}, {found.file_bytes:,} bytes")
    print_line(f"stored as: {how_stored(manifest.encode)}")
    print_line(f"written by: {written_by(manifest.created_by)}")
    if manifest.origin is not None:
        print_line(", ".join(f"{split.name} {manifest.origin.place(split.name)}" for split in found.splits))
    for name, value, remark in reading:
        print_line(f"{name}: {value} ({remark})")
    table = Table("", box=None, pad_edge=False)
    for split in found.splits:
        table.add_column(Text(displayable(split.name)))
    for label, cells in split_rows(found):
        table.add_row(label, *cells)
    console.print(table)
    for line in class_counts(found):
        print_line(line)
    print_line(left_out(found))
    for group in found.quarantine[:REASONS_PRINTED]:
        print_line(f"  {group.count:,}: {group.reason}")
    if rest := found.quarantine[REASONS_PRINTED:]:
        print_line(f"  {sum(group.count for group in rest):,}: {counted(len(rest), 'more reason', 'more reasons')}")
    for line in left_out_kinds(found):
        print_line(f"  {line}")
    print_line(f"{html}: {html.stat().st_size:,} bytes")
    for line in next_lines(*training(directory)):
        print_line(line)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed flags and returns the exit status."""
    directory: Path = arguments.shards
    html: Path = arguments.html or directory / "report.html"
    require(arguments.images >= 0, "--images", arguments.images, "0 or more")
    require(html.suffix.lower() in (".html", ".htm"), "--html", str(html), "the name of an .html file")
    found = survey(directory)
    reading = _reading(found, arguments.seed)
    split = found.train or next(iter(found.splits), None)
    sheet = None
    if arguments.images and split is not None and split.split.num_samples:
        sheet = contact_sheet(directory, split, found.class_names, arguments.images, arguments.seed)
    publish_bytes(html, page(found, reading, sheet).encode())
    _print(directory, found, reading, html)
    return 0


def main(argv: list[str] | None = None, program: str = "describe") -> int:
    """The command line; returns the exit status."""
    return run_alone(
        program, "Shows what is in a shard set, in the terminal and as one HTML page.", add_arguments, run, argv
    )


if __name__ == "__main__":
    sys.exit(main())
