"""The flags of `sdpnet report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in RUN; for several runs, report-RUN-vs-RUN.html in the first)",
    )
    add_quiet(parser)
