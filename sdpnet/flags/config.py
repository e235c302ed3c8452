"""The flags of `sdpnet config`."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument(
        "section", nargs="?", metavar="SECTION", help="a section, such as optim, or a key, such as optim.lr"
    )
    parser.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="the keys in which two configs differ: names from configs/, .yaml files or directories of runs",
    )
