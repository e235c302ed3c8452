"""The flags of `sdpnet predict`."""

from __future__ import annotations

import argparse

from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a file, a folder (with all images below it) or a quoted pattern")
    add("--model", required=True, help="run directory, checkpoint or model.safetensors")
    add("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object for each image, on a line of its own")
    parser.epilog = (
        "A file that is not a readable image is reported on stderr and skipped. Exit status: 0 if all images were "
        "predicted, 1 if some were not, 2 if none was."
    )
    add_quiet(parser)
