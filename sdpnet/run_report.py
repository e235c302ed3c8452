"""Command `sdpnet report`: the curves and final figures of one or more runs, in the terminal and as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.errors import require
from pipelines.publish import publish_bytes
from sdpnet.run_metrics import config_differences, read_runs
from sdpnet.run_page import page, summary

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the first RUN)")


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out or arguments.runs[0] / "report.html"
    require(out.suffix.lower() in (".html", ".htm"), "--out", str(out), "the name of an .html file")
    runs = read_runs(arguments.runs)
    publish_bytes(out, page(runs).encode("utf-8", "replace"))
    console = Console(highlight=False, emoji=False)

    def shown(value: str) -> Text:
        return Text(value.encode(console.encoding, "replace").decode(console.encoding))

    for rows in (summary(runs), config_differences(runs)):
        if rows:
            table = Table("", box=None, pad_edge=False)
            for one in runs:
                table.add_column(shown(one.name))
            for label, cells in rows:
                table.add_row(shown(label), *map(shown, cells))
            console.print(table)
            console.print()
    console.print(shown(f"{out}: {out.stat().st_size:,} bytes"), soft_wrap=True)
    return 0
