"""The table of an experiment, in the terminal and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sdpnet.lab.experiment import Experiment
from sdpnet.lab.results import Comparison, Result

__all__ = ["as_json", "as_table", "legend", "with_error"]


def as_table(rows: Sequence[Comparison], experiment: Experiment) -> Table:
    """The rows as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant", overflow="fold")
    for name in ("epochs", "cost", "seconds", "top-1, %", "points more", "better"):
        table.add_column(name, justify="right", no_wrap=True)
    if experiment.rounds > 1:
        table.add_column("round", justify="right", no_wrap=True)
    for row in rows:
        cells = [
            str(row.epochs),
            f"{row.compute:.2f}",
            _number(row.seconds, ",.0f"),
            with_error(row.mean, row.mean_error, ".2f"),
            with_error(row.difference, row.error, "+.2f"),
            f"{row.better}/{len(row.differences)}" if row.differences else "",
        ]
        if experiment.rounds > 1:
            cells.append(f"{row.round + 1}/{experiment.rounds}")
        failed = f" ({row.failures} failed)" if row.failures else ""
        table.add_row(Text(f"{row.variant}{failed}"), *cells)
    return table


def legend(experiment: Experiment, seeds_done: int) -> str:
    """What the columns of the table mean.

    Args:
        seeds_done: the number of seeds that the baseline has finished in the last round so far.
    """
    seeds = f"{seeds_done} of {experiment.seeds} seeds" if seeds_done < experiment.seeds else f"{seeds_done} seeds"
    error = "± is one standard error over the seeds" if seeds_done > 1 else "one seed gives no standard error"
    return (
        f"{seeds}; {error}. cost: operations as a multiple of {experiment.baseline}'s; seconds: of the steps alone; "
        f"points more, better: than {experiment.baseline} with the same seed"
    )


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


def with_error(value: float, error: float, form: str) -> str:
    """A fraction in per cent or points, with its standard error if there is one: "+6.52 ± 0.23"."""
    shown = _number(100 * value, form)
    return f"{shown} ± {100 * error:.2f}" if shown and math.isfinite(error) else shown


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""
