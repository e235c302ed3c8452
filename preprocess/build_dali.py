"""Command: converts images into a shard set of WebDataset tars with DALI's index files.

    python preprocess/build_dali.py --source IMAGENET --out SHARDS

    IMAGENET/{train,val}/CLASS/*.jpg  ->  SHARDS/{train,val}-000000.tar, .idx, .samples, ..., SHARDS/manifest.json

The tars can be read by this project's pipelines, by DALI's `fn.readers.webdataset` and by the `webdataset` library.
Everything else is the same as in `build_ffcv.py`. `sdpnet convert --format tar` does the same.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file: import sdpnet from the checkout, and no module of this folder by its bare name
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    from sdpnet import preprocess  # noqa: F401 - from here on, Ctrl-C ends the command with one line

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.preprocess.conversion import command
from sdpnet.preprocess.conversion.writers.tar import SHARD_BYTES, TarWriter
from sdpnet.preprocess.flags import conversion

__all__ = ["add_arguments", "main", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    conversion.add_arguments(parser)
    shard = "largest size of a tar in MiB (default: %(default)s)"
    parser.add_argument("--shard-mib", metavar="N", type=int, default=SHARD_BYTES >> 20, help=shard)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed flags and returns the exit status."""
    if arguments.shard_mib < 1:
        raise UserError(f"--shard-mib {arguments.shard_mib}: must be at least 1")
    shard_bytes = arguments.shard_mib << 20
    make_writer = partial(TarWriter, shard_bytes=shard_bytes)
    return command.build(arguments, make_writer, {"format": TarWriter.format, "shard_bytes": shard_bytes})


def main(argv: list[str] | None = None, program: str = "build_dali") -> int:
    """The command line; returns the exit status."""
    description = "Converts images into a shard set of WebDataset tars with DALI's index files."
    return run_alone(program, description, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
