"""Times the pipelines with `sdpnet bench`, FFCV's own ImageNet setting included.

    python -m sdpnet.gpu_checks.programs.data_path --data SHARDS --pipelines native,ffcv,ffcv_raw -- BENCH'S FLAGS

`ffcv_raw` needs a copy of the shard set of which half of the images are raw. It is made first, and removed at the end
unless it was there before.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from sdpnet.gpu_checks.programs.commands import run_module
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["add_arguments", "main", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="SHARDS", help="shard set")
    add("--pipelines", required=True, metavar="NAMES", help="contestants of sdpnet bench")
    add("flags", nargs="*", metavar="-- FLAGS", help="further flags of sdpnet bench")


def run(arguments: argparse.Namespace) -> int:
    copy = arguments.data.with_name(f"{arguments.data.name}-half-raw")
    was_there = copy.exists()
    if "ffcv_raw" in arguments.pipelines.split(",") and not was_there:
        try:
            run_module("sdpnet.pipelines.benchmarks.half_raw", ["--data", arguments.data])
        except UserError as error:  # such as shards in tars, which FFCV does not read: its row says so
            print(error, flush=True)
    try:
        words = ["bench", "--data", arguments.data, "--pipelines", arguments.pipelines, *arguments.flags]
        run_module("sdpnet.cli", words)
    finally:
        if not was_there:
            shutil.rmtree(copy, ignore_errors=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_alone("data_path", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
