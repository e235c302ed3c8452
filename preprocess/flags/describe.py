"""The flags of `sdpnet describe`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdpnet.pipelines.terminal.quiet import add_quiet
from sdpnet.preprocess.inspection.recipe import RECIPE

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.epilog = f"The contact sheet is augmented with the seed recipe (configs/sdpnet_xl.yaml): {RECIPE}."
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="directory with a manifest.json")
    add("--html", metavar="FILE", type=Path, help="the page (default: SHARDS/report.html)")
    images = "largest number of images on the contact sheet; 0 omits it (default: %(default)s)"
    add("--images", metavar="N", type=int, default=24, help=images)
    add("--seed", metavar="N", type=int, default=0, help="seed of the contact sheet (default: %(default)s)")
    add_quiet(parser)
