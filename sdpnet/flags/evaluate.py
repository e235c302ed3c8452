"""The flags of `sdpnet evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from sdpnet.pipelines.options import Pipeline
from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--model", required=True, type=Path, help="run directory, checkpoint or model.safetensors")
    weights = "averaged weights if there are any, or those of the last step (default: %(default)s)"
    add("--weights", choices=["ema", "raw"], default="ema", help=weights)
    add("--data", required=True, type=Path, help="shard set")
    add("--split", default="val", help="(default: %(default)s)")
    add("--pipeline", choices=get_args(Pipeline), default="auto", help="(default: %(default)s)")
    add(
        "--batch-size",
        type=int,
        default=128,
        metavar="N",
        help="images in a batch of each process (default: %(default)s)",
    )
    add("--image-size", type=int, metavar="N", help="pixels a side (default: that of the training)")
    add(
        "--centre-fraction",
        type=float,
        metavar="X",
        help="fraction of the shorter side that is kept (default: that of the model)",
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="(default: %(default)s)")
    add("--per-class", type=Path, metavar="FILE", help="write each class's accuracy to a CSV file")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add_quiet(parser)
