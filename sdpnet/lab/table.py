"""The table of an experiment, in the terminal and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from sdpnet.lab.experiment import Experiment
from sdpnet.lab.results import Comparison, Result
from sdpnet.pipelines.errors import printable

__all__ = ["as_json", "as_table"]


def as_table(rows: Sequence[Comparison], experiment: Experiment, seeds_done: int) -> Table:
    """The rows as a table.

    Args:
        seeds_done: the number of seeds that the baseline has finished in the last round so far.
    """
    baseline = printable(experiment.baseline)
    table = Table(title=f"{printable(experiment.config)} on {printable(experiment.data)}", title_justify="left")
    table.add_column("variant", overflow="fold")
    for name in ("epochs", "compute", "seconds", "top-1, %", f"points to {baseline}", "better in"):
        table.add_column(name, justify="right")
    if experiment.rounds > 1:
        table.add_column("round", justify="right")
    for row in rows:
        cells = [
            str(row.epochs),
            f"{row.compute:.2f}",
            _number(row.seconds, ",.0f"),
            _with_error(row.mean, row.mean_error, ".2f"),
            _with_error(row.difference, row.error, "+.2f"),
            f"{row.better} of {len(row.differences)}" if row.differences else "",
        ]
        if experiment.rounds > 1:
            cells.append(f"{row.round + 1} of {experiment.rounds}")
        failed = f" ({row.failures} failed)" if row.failures else ""
        table.add_row(Text(f"{row.variant}{failed}"), *cells)
    seeds = f"{seeds_done} of {experiment.seeds} seeds" if seeds_done < experiment.seeds else f"{seeds_done} seeds"
    error = "± one standard error over the seeds" if seeds_done > 1 else "one seed gives no standard error"
    table.caption = f"{seeds}; {error}. Differences are between trainings of the same seed."
    table.caption_justify = "left"
    return table


def as_json(
    experiment: Experiment, results: Sequence[Result], rows: Sequence[Comparison], facts: Mapping[str, Any]
) -> bytes:
    """The experiment, its results and the table. Numbers that do not exist are null; points are fractions here."""
    table = [
        {**asdict(row), "mean": row.mean, "mean_error": row.mean_error}
        | {"difference": row.difference, "error": row.error, "better": row.better}
        for row in rows
    ]
    content = {**facts, "experiment": asdict(experiment), "table": table, "results": [asdict(one) for one in results]}
    return (json.dumps(_finite(content), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_error(value: float, error: float, form: str) -> str:
    shown = _number(100 * value, form)
    return f"{shown} ± {100 * error:.2f}" if shown and math.isfinite(error) else shown


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""
