"""The flags of `sdpnet sheet`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final, get_args

from sdpnet.config.setting import add_settings
from sdpnet.pipelines.options import Pipeline
from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["SHOWN", "add_arguments"]

SHOWN: Final = 16  # images, at most, by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--config", default="sdpnet_xl", help="as in train (default: %(default)s)")
    add("--data", help="shard set (config key data.path)")
    add("--pipeline", choices=get_args(Pipeline), help="config key data.pipeline")
    add_settings(parser)
    add("--epoch", type=int, default=0, metavar="N", help="the epoch, from 0 (default: %(default)s)")
    add("--batch", type=int, default=0, metavar="N", help="the batch in the epoch, from 0 (default: %(default)s)")
    add("--count", type=int, metavar="N", help=f"the number of images, from the first on (default: at most {SHOWN})")
    add("--out", type=Path, default=Path("sheet.png"), metavar="FILE", help="a .png file (default: %(default)s)")
    add_quiet(parser)
