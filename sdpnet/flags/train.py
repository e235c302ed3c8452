"""The flags of `sdpnet train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final, get_args

from sdpnet.config.names import config_names
from sdpnet.config.setting import add_settings
from sdpnet.pipelines.options import Pipeline
from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["PROFILED_STEPS", "add_arguments"]

PROFILED_STEPS: Final = (10, 5)  # first step and number of steps for --profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.epilog = (
        f"Configs: {', '.join(config_names())}. Each of their keys can be set, as in optim.lr=1e-3. All keys: sdpnet "
        "config; those of a section: sdpnet config optim."
    )
    parser.add_argument(
        "--config", help="a name from configs/ or the path of a .yaml file; --resume alone takes the run's own"
    )
    parser.add_argument("--data", help="shard set made by sdpnet convert (config key data.path)")
    parser.add_argument("--out", required=True, type=Path, help="directory of the run")
    parser.add_argument("--pipeline", choices=get_args(Pipeline), help="config key data.pipeline")
    add_settings(parser)
    parser.add_argument("--resume", action="store_true", help="continue the newest checkpoint in --out")
    first, count = PROFILED_STEPS
    traced = f"write a trace of {count} steps to OUT/trace.json (config key log.profile = [{first}, {count}])"
    parser.add_argument("--profile", action="store_true", help=traced)
    add_quiet(parser)
