"""The flags of `sdpnet adopt`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdpnet.pipelines.terminal.quiet import add_quiet
from sdpnet.preprocess.encoding.settings import EXIF_CHOICES
from sdpnet.preprocess.flags.sources import add_source_arguments

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.epilog = "Without --out, --train and --val are .beton files by FFCV, which become a shard set as they are."
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, help="folder of the shard set, for images that stay where they are")
    add_source_arguments(parser)
    add("--checksums", action="store_true", help="read all images and store a CRC-32 of each, for verify")
    exif = "EXIF orientation; training on ImageNet usually ignores it (default: %(default)s)"
    add("--exif", choices=EXIF_CHOICES, default="ignore", help=exif)
    on_bad = "an image that cannot be used ends the command, or is skipped and listed (default: %(default)s)"
    add("--on-bad", choices=["fail", "skip"], default="fail", help=on_bad)
    add("--replace", action="store_true", help="index the images of DIR again, after some of them have changed")
    workers = "number of processes; more than CPU cores help on slow network disks (default: one for each core)"
    add("--workers", metavar="N", type=int, help=workers)
    add("--classes", type=Path, metavar="FILE", help="for .beton files: names of the classes, one a line")
    add("--decode", action="store_true", help="decode every image first, and refuse damaged ones")
    add_quiet(parser)
