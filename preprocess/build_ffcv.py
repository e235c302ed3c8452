"""Command: converts images into a shard set of `.beton` files.

    python preprocess/build_ffcv.py --source IMAGENET --out SHARDS

    IMAGENET/{train,val}/CLASS/*.jpg  ->  SHARDS/{train,val}.beton, SHARDS/manifest.json

Every image is found in SHARDS, or the command ends with the name of the one that cannot be converted. With `--on-bad
skip` it goes on, and SHARDS/quarantine.jsonl lists each such file with its reason. All other files of IMAGENET are
counted by kind in the summary and the manifest. A run that ended early, however it did, is continued by the same
command.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import from the checkout, and nothing by its bare name from this folder
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    from sdpnet import preprocess  # noqa: F401 - from here on, Ctrl-C ends with one line

from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.preprocess.conversion.command import add_arguments, build
from sdpnet.preprocess.conversion.writers.beton import BetonWriter

__all__ = ["add_arguments", "main", "run"]


def run(arguments: argparse.Namespace) -> int:
    return build(arguments, BetonWriter, {"format": BetonWriter.format})


def main(argv: list[str] | None = None, program: str = "build_ffcv") -> int:
    """The command line; returns the exit status."""
    return run_alone(program, "Converts images into a shard set of .beton files.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
