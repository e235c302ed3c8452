"""Command: converts images into a shard set of `.beton` files.

    python preprocess/build_ffcv.py --source IMAGENET --out SHARDS

    IMAGENET/{train,val}/CLASS/*.jpg  ->  SHARDS/{train,val}.beton, SHARDS/manifest.json

Every image is converted, or the command ends with the name of the one that cannot be. With `--on-bad skip` it
continues, and SHARDS/quarantine.jsonl lists each of these files with the reason. All other files of IMAGENET are
counted by kind in the summary and the manifest. The same command continues a run that was interrupted in any way.
`sdpnet convert` does the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import sdpnet from the checkout, and no module of this folder by its bare name
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    from sdpnet import preprocess  # noqa: F401 - from here on, Ctrl-C ends the command with one line

from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.preprocess.conversion.command import build
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.flags.conversion import add_arguments

__all__ = ["add_arguments", "main", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed flags and returns the exit status."""
    return build(arguments, BetonWriter, {"format": BetonWriter.format})


def main(argv: list[str] | None = None, program: str = "build_ffcv") -> int:
    """The command line; returns the exit status."""
    return run_alone(program, "Converts images into a shard set of .beton files.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
