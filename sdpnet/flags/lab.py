"""The flags of `sdpnet lab`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal, get_args

from sdpnet.config.setting import add_settings
from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["Equal", "add_arguments"]

Equal = Literal["compute", "epochs", "own"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.epilog = (
        "Example: sdpnet lab --config tiny_imagenet/cpu_seed --data SHARDS --out LAB --variant modern "
        "config=tiny_imagenet/cpu_modern --variant 'qk norm' model.qk_norm=true. The same in a file for --variants: "
        "'modern: {config: tiny_imagenet/cpu_modern}', and on the next line 'qk norm: {model.qk_norm: true}'."
    )
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="LAB", help="directory of the experiment; alone, it continues")
    add("--config", help="the baseline: a name from configs/ or the path of a .yaml file")
    add("--data", metavar="SHARDS", help="shard set made by sdpnet convert")
    add(
        "--variant",
        action="append",
        default=[],
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help="a variant: its name and the keys in which it differs; config=NAME starts it from another config",
    )
    add("--variants", type=Path, metavar="FILE", help="a YAML file of variants: name, then keys and values")
    add_settings(parser)
    add("--seeds", type=int, metavar="N", help="trainings of each variant (default: 3)")
    add("--epochs", type=int, metavar="N", help="the baseline's epochs (default: its config's)")
    add(
        "--equal",
        choices=get_args(Equal),
        help="what is equal: compute (operations; epochs are adapted), epochs, or own (each config's own epochs; "
        "default: compute)",
    )
    add(
        "--rounds",
        type=int,
        metavar="N",
        help="rounds of successive halving: each has half of the variants of the one before it and twice the epochs "
        "(default: 1)",
    )
    add(
        "--minutes",
        type=float,
        metavar="N",
        help="time for everything, from which the epochs are chosen; with --epochs, only trainings that fit are begun",
    )
    add("--jobs", type=int, default=1, metavar="N", help="trainings at a time, on a CPU (default: %(default)s)")
    add_quiet(parser)
