"""The flags of `sdpnet bench`. torch is not imported, so that --help and mistakes are answered at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final, get_args

from sdpnet.pipelines.machine import usable_cores
from sdpnet.pipelines.options import Pipeline
from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["CEILINGS", "PEER_NAMES", "add_arguments"]

_PIPELINES: Final = get_args(Pipeline)[1:]  # without auto
PEER_NAMES: Final = ("webdataset", "timm", "spdl", "ffcv_raw", "torchvision_gpu")
CEILINGS: Final = {
    "decode": "whole frames, libjpeg-turbo",
    "huffman": "the Huffman decoder alone, libjpeg-turbo",
    "resize": "our resize of the planned crops",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.epilog = (
        f"Pipelines: {', '.join(_PIPELINES)}. Other projects' loaders: {', '.join(PEER_NAMES)}. "
        f"Single steps alone: {', '.join(f'{name} ({what})' for name, what in CEILINGS.items())}."
    )
    add = parser.add_argument
    add("--data", metavar="SHARDS", required=True, help="shard set")
    default = ",".join(name for name in _PIPELINES if name != "synthetic")
    add("--pipelines", metavar="NAMES", default=default, help="comma-separated (default: %(default)s)")
    add("--ceilings", action="store_true", help=f"also synthetic, {', '.join(CEILINGS)}")
    add(
        "--cores",
        metavar="N",
        default=str(len(usable_cores())),
        help="number of cores, or a list of numbers (default: %(default)s)",
    )
    add("--image-size", metavar="N", default="224", help="pixels a side, or a list (default: %(default)s)")
    add("--mode", choices=["train", "eval"], default="train", help="random or central crops (default: %(default)s)")
    add("--split", help="default: train, or val with --mode eval")
    add("--batch-size", metavar="N", type=int, default=256, help="default: %(default)s")
    add("--rounds", metavar="N", type=int, default=5, help="number of measured rounds (default: %(default)s)")
    add("--seconds", metavar="S", type=float, default=2.0, help="approximate length of a round (default: %(default)s)")
    add("--batches", metavar="N", type=int, default=0, help="number of batches in a round, instead of --seconds")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add("--json", metavar="FILE", type=Path, help="also write the figures here")
    add_quiet(parser)
