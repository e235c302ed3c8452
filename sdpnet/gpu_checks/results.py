"""The results of `./dev gpu`: `results.json`, which later runs continue, and the table at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sdpnet.gpu_checks.part import DONE, Outcome
from sdpnet.pipelines.errors import UserError, printable
from sdpnet.pipelines.files.atomic_write import publish_bytes

__all__ = ["done_before", "table", "verdict", "write_results"]


def done_before(path: Path, settings: Mapping[str, Any]) -> dict[str, Outcome]:
    """The parts that an earlier run with the same `results.json` has done.

    Raises:
        UserError: that run had other settings, or the file is not readable.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        outcomes = [Outcome(**row) for row in content["parts"]]
        before = content["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: cannot be read as results of ./dev gpu; use another --out") from None
    if before != dict(settings):
        differing = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise UserError(f"{path}: is of a run with another {differing}; use another --out")
    return {row.part: replace(row, earlier=True) for row in outcomes if row.status in DONE}


def write_results(
    path: Path, settings: Mapping[str, Any], machine: Mapping[str, Any], outcomes: Sequence[Outcome]
) -> None:
    content = {"settings": settings, "machine": machine, "parts": [asdict(outcome) for outcome in outcomes]}
    publish_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def verdict(outcomes: Sequence[Outcome]) -> tuple[bool, str]:
    """Whether all checks that were begun have passed, and a line that says so."""
    checks = [outcome for outcome in outcomes if outcome.is_check]
    bad = [check.part for check in checks if check.status in ("failed", "cut off")]
    passed = [check.part for check in checks if check.status == "passed"]
    rest = [check.part for check in checks if check.status in ("left out", "not possible")]
    if bad:
        return False, f"NOT CORRECT, or not shown to be: {', '.join(bad)}"
    without = f"; not checked: {', '.join(rest)}" if rest else ""
    return True, f"correct: {', '.join(passed)}{without}" if passed else f"nothing was checked{without}"


def table(title: str, outcomes: Sequence[Outcome]) -> Group:
    """One row for each part, and the verdict."""
    rows = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    rows.add_column("part", no_wrap=True)
    rows.add_column("status", no_wrap=True)
    rows.add_column("s", justify="right", no_wrap=True)
    rows.add_column("figures", overflow="fold")
    for outcome in outcomes:
        status = f"{outcome.status}{' earlier' if outcome.earlier else ''}"
        took = f"{outcome.seconds:,.0f}" if outcome.seconds else ""
        rows.add_row(outcome.part, Text(status), took, Text(printable(outcome.figures)))
    return Group(rows, Text(verdict(outcomes)[1]))
