"""The flags of `sdpnet doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["DEFAULT_CONFIG", "add_arguments"]

DEFAULT_CONFIG: Final = "sdpnet_xl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--data", type=Path, metavar="SHARDS", help="shard set for which reading and decoding are measured")
    add("--split", default="train", help="default: %(default)s")
    add(
        "--config", default=DEFAULT_CONFIG, help="config whose model and image size are measured (default: %(default)s)"
    )
    add("--step", action="store_true", help="measure the model's step without a GPU too")
    add("--json", action="store_true", help="print JSON")
    add_quiet(parser)
