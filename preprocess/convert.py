"""Command: converts images into a shard set.

    sdpnet convert --source IMAGENET --out SHARDS

    IMAGENET/{train,val}/CLASS/*.jpg  ->  SHARDS/{train,val}.beton, SHARDS/manifest.json

`--format tar` writes WebDataset tars with DALI's index files instead. Every image is converted, or the command ends
with the name of the one that cannot be. With `--on-bad skip` it continues, and SHARDS/quarantine.jsonl lists each of
these files with the reason. The same command continues a run that was interrupted in any way. In a checkout without an
installation, `python preprocess/build_ffcv.py` and `python preprocess/build_dali.py` do the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import sdpnet from the checkout, and no module of this folder by its bare name
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    from sdpnet import preprocess  # noqa: F401 - from here on, Ctrl-C ends the command with one line

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.preprocess import build_dali, build_ffcv
from sdpnet.preprocess.conversion.writers.tar import SHARD_BYTES
from sdpnet.preprocess.flags.convert import add_arguments

__all__ = ["add_arguments", "main", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed flags and returns the exit status."""
    if arguments.format == "beton":
        if arguments.shard_mib is not None:
            raise UserError("--shard-mib: is for --format tar; a .beton file holds a whole split")
        return build_ffcv.run(arguments)
    if arguments.shard_mib is None:
        arguments.shard_mib = SHARD_BYTES >> 20
    return build_dali.run(arguments)


def main(argv: list[str] | None = None, program: str = "convert") -> int:
    """The command line; returns the exit status."""
    return run_alone(program, "Converts images into a shard set.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
