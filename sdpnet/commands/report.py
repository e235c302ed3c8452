"""Command `sdpnet report`: the curves and final figures of one or more runs, in the terminal and as one HTML page."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdpnet.distributed.run_directory import LOCK_NAME
from sdpnet.flags.report import add_arguments
from sdpnet.pipelines.errors import printable, require
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet
from sdpnet.reporting.finished_run import export_command
from sdpnet.reporting.run_metrics import Run, config_differences, read_runs
from sdpnet.reporting.run_page import page, summary

__all__ = ["add_arguments", "page_path", "run"]

LONGEST_NAME: Final = 120  # bytes of the names of runs in the name of a page; file systems allow 255 in all


def page_path(directories: Sequence[Path]) -> Path:
    """The default path of the page.

    For one run it is `report.html` in its directory. For several runs it is a file in the directory of the first one,
    with a name made of the names of all runs, so that reports of different comparisons do not overwrite each other. If
    these names are equal or too long, a checksum of the paths is appended.
    """
    first = directories[0]
    if len(directories) == 1:
        return first / "report.html"
    resolved = [directory.resolve() for directory in directories]
    names = [path.name for path in resolved]
    name = "-vs-".join(names)
    if len(set(names)) < len(names) or len(name.encode("utf-8", "surrogateescape")) > LONGEST_NAME:
        paths = "\0".join(map(str, resolved)).encode("utf-8", "surrogateescape")
        short = name.encode("utf-8", "surrogateescape")[:LONGEST_NAME].decode("utf-8", "ignore")
        name = f"{short}-{hashlib.sha256(paths).hexdigest()[:8]}"
    return first / f"report-{name}.html"


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out or page_path(arguments.runs)
    require(out.suffix.lower() in (".html", ".htm"), "--out", str(out), "the name of an .html file")
    runs = read_runs(arguments.runs)
    publish_bytes(out, page(runs).encode("utf-8", "replace"))
    console = Console(highlight=False, emoji=False)

    def shown(value: str) -> Text:
        return Text(printable(value).encode(console.encoding, "replace").decode(console.encoding))

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
    for line in next_lines(*_next(arguments.runs, runs)):
        console.print(Text(line), soft_wrap=True)
    return 0


def _next(directories: Sequence[Path], runs: Sequence[Run]) -> tuple[str | Path, ...]:
    """The next command.

    It evaluates the best finished run on its data or, if the data does not exist here, exports it. If no run is
    finished, the command resumes the first one that is not being trained at present.
    """
    finished = [index for index, run in enumerate(runs) if run.finished]
    if finished:
        best = max(finished, key=lambda index: _best_top1(runs[index]))
        data = Path(str(runs[best].config.get("data.path", "")))
        if os.path.isfile(data / MANIFEST_NAME):  # also False for a path that is not valid on this system
            return sdpnet("evaluate", "--model", directories[best], "--data", data)
        return export_command(directories[best])
    idle = [path for path in directories if (path / "config.yaml").is_file() and not (path / LOCK_NAME).exists()]
    return sdpnet("train", "--resume", "--out", idle[0]) if idle else ()


def _best_top1(run: Run) -> float:
    scores = [run.series[key].finite for key in ("top1", "ema_top1") if key in run.series]
    return max((float(found.max()) for found in scores if len(found)), default=-1.0)
