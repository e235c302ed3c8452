"""The flags of `sdpnet verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdpnet.pipelines.machine import MAX_WORKERS, core_share
from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["add_arguments"]


def _number_of_threads(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{number}: must be 1 to {MAX_WORKERS}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="directory with a manifest.json")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="check only the structure, without reading an image")
    depth.add_argument("--decode", action="store_true", help="also decode every image")
    parser.add_argument(
        "--workers", type=_number_of_threads, default=core_share(), help="number of threads that decode"
    )
    add_quiet(parser)
