"""The flags of `sdpnet bench step`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final, get_args

from sdpnet.model.options import MODELS
from sdpnet.pipelines.options import Pipeline
from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["FEEDS", "MODELS_BY_DEFAULT", "PEERS", "add_arguments"]

PEERS: Final = ("vit_base_patch16_224", "convmixer_1024_20_ks9_p14", "convnext_base")  # models of timm
MODELS_BY_DEFAULT: Final = ("sdpnet_l", "sdpnet_xl", "sdpnet_xxl", *PEERS)
FEEDS: Final = tuple(name for name in get_args(Pipeline) if name not in ("auto", "synthetic"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.epilog = (
        f"Models: {', '.join(MODELS)}, other configs (modern/sdpnet_xl), and timm's by their names. "
        f"Feeds with --data: {', '.join(FEEDS)}."
    )
    add = parser.add_argument
    add("--model", metavar="NAMES", default=",".join(MODELS_BY_DEFAULT), help="comma-separated (default: %(default)s)")
    add("--data", metavar="SHARDS", help="shard set for feeds beside the synthetic one")
    add("--pipelines", metavar="NAMES", default="native,dali", help="feeds from --data (default: %(default)s)")
    add("--image-size", metavar="N", type=int, default=224, help="default: %(default)s")
    add("--batch-size", metavar="N", type=int, default=256, help="default: %(default)s")
    add("--rounds", metavar="N", type=int, default=5, help="rounds that count (default: %(default)s)")
    add("--seconds", metavar="S", type=float, default=3.0, help="approximate time of a round (default: %(default)s)")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="default: %(default)s")
    add("--compile", choices=["auto", "yes", "no"], default="auto", help="default: %(default)s")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add("--json", metavar="FILE", type=Path, help="also write the results to this file")
    add("--markdown", metavar="FILE", type=Path, help="also write the results to the table in this page")
    add_quiet(parser)
