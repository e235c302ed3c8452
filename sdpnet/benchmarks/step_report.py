"""The results of `sdpnet bench step` as tables in the terminal, as a record, and as a table in a Markdown page."""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table
from rich.text import Text

from sdpnet.benchmarks.step_race import CONV_BLOCKS, SYNTHETIC, Entry, Race
from sdpnet.execution.hardware import Card, StepChoices
from sdpnet.model.flops import TRAINING_FLOPS_PER_MAC
from sdpnet.pipelines.errors import UserError, printable
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.machine import commit, cpu_name, driver, installed_versions, usable_cores
from sdpnet.training.step import PARTS

__all__ = ["Page", "record", "tables"]

_BEGIN: Final = "<!-- sdpnet bench step -->"
_END: Final = "<!-- end of sdpnet bench step -->"
_NOTE: Final = (
    "Images/s are given for each round. Parts are in ms of a step: the GPU's time between events, or the wall clock on "
    "CPUs. On a GPU, data wait and augment are the times for which it was idle before a batch was complete and before "
    "it was augmented; both are done during the step before. augment_ms and copy_ms are for one batch, on an idle "
    "device. Share of matmul: 6 FLOP for each multiply-accumulate of the forward pass, relative to the rate of large "
    "matrix products in the step's dtype, which is measured between the rounds. Conv blocks: their share of the time "
    "of forward and backward, and of the arithmetic. Peak memory: the memory that torch allocates for this model "
    "alone, without that of a pipeline."
)


def _share_of_matmul(race: Race, entry: Entry) -> float:
    """The model's FLOP/s as a fraction of the rate of large matrix products, the median over rounds."""
    flops = TRAINING_FLOPS_PER_MAC * entry.macs
    return statistics.median(
        rate * flops / matmul for rate, matmul in zip(entry.rates, race.matmul_rates, strict=False)
    )


def _ratio_to_synthetic(race: Race, entry: Entry) -> float | None:
    """The rate divided by that of the same model on fixed noise, the median over rounds."""
    for other in race.running:
        if other.model == entry.model and other.feed == SYNTHETIC:
            ratios = (rate / free for rate, free in zip(entry.rates, other.rates, strict=False))
            return statistics.median(ratios)
    return None


def _share(entry: Entry, part: str, parts: tuple[str, ...]) -> float:
    """The time of a part divided by the sum of several parts, the median over rounds."""
    totals = map(sum, zip(*(entry.milliseconds(name) for name in parts), strict=True))
    return statistics.median(part / total for part, total in zip(entry.milliseconds(part), totals, strict=True))


def _conv_blocks(entry: Entry) -> tuple[float, float] | None:
    """(share of the time of forward and backward, share of the arithmetic), or None for models without conv blocks."""
    if not entry.conv_macs:
        return None
    return _share(entry, CONV_BLOCKS, ("forward", "backward")), entry.conv_macs / entry.macs


def _share_of_augment(race: Race, entry: Entry) -> float:
    """The time of the device stage alone divided by that of a step, the median over rounds."""
    steps = (round_.seconds / entry.num_steps for round_ in entry.rounds)
    return statistics.median(alone / step for alone, step in zip(race.augment_seconds, steps, strict=False))


def _peak_bytes(entry: Entry) -> int | None:
    return max((round_.peak_bytes for round_ in entry.rounds if round_.peak_bytes is not None), default=None)


def tables(race: Race, title: str) -> list[Table]:
    """A table of rates, and a table of the parts of a step."""
    rates, parts = (
        Table(title=heading, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for heading in (title, "ms of a step")
    )
    for table, columns in ((rates, ("images/s", "min..max", "of matmul", "memory")), (parts, (*PARTS, CONV_BLOCKS))):
        table.add_column("", overflow="fold")
        table.add_column("feed", no_wrap=True)
        for name in columns:
            table.add_column(
                {"data wait": "wait", CONV_BLOCKS: "(conv)"}.get(name, name), justify="right", no_wrap=True
            )
    for entry in race.entries:
        model = Text(printable(entry.model))
        if entry.reason:
            rates.add_row(model, entry.feed, "-")
            continue
        peak, conv = _peak_bytes(entry), _conv_blocks(entry)
        rates.add_row(
            model,
            entry.feed,
            f"{statistics.median(entry.rates):,.0f}",
            f"{min(entry.rates):,.0f}..{max(entry.rates):,.0f}",
            f"{_share_of_matmul(race, entry):.0%}",
            f"{peak / 1e9:,.1f} GB" if peak is not None else "",
        )
        times = [f"{statistics.median(entry.milliseconds(part)):,.1f}" for part in (*PARTS, CONV_BLOCKS)]
        parts.add_row(model, entry.feed, *times[:-1], times[-1] if conv else "")
    return [rates, parts]


def _result(race: Race, entry: Entry) -> dict[str, Any]:
    row = {"model": entry.model, "feed": entry.feed}
    if entry.reason:
        return {**row, "not_measured": entry.reason}
    parts = {part: entry.milliseconds(part) for part in (*PARTS, CONV_BLOCKS)}
    conv, ratio = _conv_blocks(entry), _ratio_to_synthetic(race, entry)
    return {
        **row,
        "parameters": entry.num_parameters,
        "forward_gmac": round(entry.macs / 1e9, 3),
        "steps": entry.num_steps,
        "images_per_second": [round(rate, 1) for rate in entry.rates],
        "median": round(statistics.median(entry.rates), 1),
        "min": round(min(entry.rates), 1),
        "max": round(max(entry.rates), 1),
        "to_synthetic": ratio and round(ratio, 4),
        "part_ms": {
            part: {"median": round(statistics.median(ms), 3), "min": round(min(ms), 3), "max": round(max(ms), 3)}
            for part, ms in parts.items()
            if conv or part != CONV_BLOCKS
        },
        "conv_blocks": conv and {"share_of_time": round(conv[0], 4), "share_of_macs": round(conv[1], 4)},
        "share_of_augment": round(_share_of_augment(race, entry), 4),
        "share_of_matmul": round(_share_of_matmul(race, entry), 4),
        "peak_bytes": _peak_bytes(entry),
    }


def record(race: Race, command: str, sizes: dict[str, int], card: Card, choices: StepChoices) -> dict[str, Any]:
    """The results as a record of the form in records/. `sizes` are arguments of the command that the record repeats."""
    now = datetime.datetime.now(datetime.timezone.utc)
    on_gpu = card.capability is not None
    return {
        "date": now.date().isoformat(),
        "what": "Training steps timed part by part, models and feeds by turns in one process",
        "commit": commit(),
        "commands": [command],
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(usable_cores()),
            "threads": torch.get_num_threads(),
            "gpu": card.name if on_gpu else None,
            "compute_capability": f"{card.capability[0]}.{card.capability[1]}" if card.capability else None,
            "driver": driver(),
        },
        "versions": installed_versions(),
        "note": _NOTE,
        "step": str(choices),
        "choices": race.notes,
        **sizes,
        "matmul_tflops": [round(rate / 1e12, 3) for rate in race.matmul_rates],
        "augment_ms": [round(1000 * seconds, 3) for seconds in race.augment_seconds],
        "copy_ms": [round(1000 * seconds, 3) for seconds in race.copy_seconds] or None,
        "results": [_result(race, entry) for entry in race.entries],
    }


class Page:
    """A Markdown page with two comments between which the table is written.

    Raises:
        UserError: the page cannot be read, or the comments are not in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--markdown {path}: {getattr(error, 'strerror', None) or error}") from None
        before, begin, rest = text.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        if not begin or not end:
            raise UserError(
                f"--markdown {path}: has no line {_BEGIN!r} with {_END!r} after it; the table goes between them"
            )
        self._around = f"{before}{begin}\n", f"{end}{after}"

    def fill(self, race: Race, title: str, json_file: Path | None) -> None:
        """Replaces the text between the comments by the results, and writes the page."""
        before, after = self._around
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        where = os.path.relpath(json_file, self._path.parent) if json_file else ""
        source = f"{title}; {date}{f', [record]({where})' if json_file else ''}."
        text = "\n".join((source, "", *_markdown(race), ""))
        publish_bytes(self._path, f"{before}{text}{after}".encode())


def _markdown(race: Race) -> Iterator[str]:
    columns = ("model", "feed", "images/s", "of synthetic", "of matmul", "augment", "conv: time, arithmetic", "memory")
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for entry in race.entries:
        cells = [entry.reason.replace("|", "/") or "not measured", *[""] * 5]
        if not entry.reason:
            peak, conv, ratio = _peak_bytes(entry), _conv_blocks(entry), _ratio_to_synthetic(race, entry)
            cells = [
                f"{statistics.median(entry.rates):,.0f} ({min(entry.rates):,.0f} to {max(entry.rates):,.0f})",
                f"{ratio:.3f}" if ratio is not None and entry.feed != SYNTHETIC else "",
                f"{_share_of_matmul(race, entry):.1%}",
                f"{_share_of_augment(race, entry):.1%}",
                f"{conv[0]:.1%}, {conv[1]:.1%}" if conv else "",
                f"{peak / 1e9:,.1f} GB" if peak is not None else "",
            ]
        yield f"| {' | '.join((entry.model, entry.feed, *cells))} |"
