"""The differences of an experiment as a drawing: a line for each variant, with its seeds and its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from sdpnet.lab.experiment import Experiment
from sdpnet.lab.results import Comparison
from sdpnet.lab.table import with_error

__all__ = ["as_svg"]

_PLOT: Final = 440  # the width of the plot itself
_RIGHT: Final = 130  # the width to the right of it, for the figures
_LETTER: Final = 7.5  # the mean width of a letter
_TOP: Final = 44
_ROW: Final = 24
_INK, _FAINT, _BETTER, _WORSE = "#263238", "#b0bec5", "#2e7d32", "#c62828"


def as_svg(rows: Sequence[Comparison], experiment: Experiment) -> str:
    """Draws the difference of each variant from the baseline, in points of top-1.

    A dot is the mean of the seeds, the bar beside it one standard error to each side, and each small ring one seed.

    Args:
        rows: as `comparisons` gives them: the baseline first. Variants without a difference are left out.

    Returns:
        an SVG document, without scripts and without anything from a network.
    """
    shown = [row for row in rows if row.differences]
    values = [value for row in shown for value in (*(100 * one for one in row.differences), *_ends(row))]
    step = _step(max([*values, 0.0]) - min([*values, 0.0]))
    # less and plus a hair, because 4.000000001 is 4
    low = math.floor(min([*values, 0.0]) / step + 1e-6)
    high = math.ceil(max([*values, 0.0]) / step - 1e-6)
    high = max(high, low + 1)
    bottom = _TOP + _ROW * max(len(shown), 1)

    left = round(36 + _LETTER * max((len(row.variant) for row in shown), default=0))
    width = left + _PLOT + _RIGHT

    def x(points: float) -> float:
        return round(left + (points / step - low) / (high - low) * _PLOT, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 44}" role="img" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="white"/><g fill="{_INK}">',
        f'<text x="12" y="22">{escape(_title(rows, experiment))}</text>',
    ]
    for number in range(low, high + 1):
        place, colour = x(number * step), _INK if number == 0 else _FAINT
        parts.append(f'<path d="M{place} {_TOP - 8}V{bottom}" stroke="{colour}" fill="none"/>')
        parts.append(f'<text x="{place}" y="{bottom + 16}" text-anchor="middle">{_signed(number * step)}</text>')
    for index, row in enumerate(shown):
        y = _TOP + _ROW * (index + 0.5)
        parts.append(f'<g><title>{escape(row.variant)}</title><text x="12" y="{y + 4}">{escape(row.variant)}</text>')
        colour = _BETTER if row.difference > 0 else _WORSE
        for value in row.differences:
            parts.append(f'<circle cx="{x(100 * value)}" cy="{y}" r="3.5" fill="none" stroke="{_FAINT}"/>')
        first, last = (x(value) for value in _ends(row))
        parts.append(f'<path d="M{first} {y}H{last}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(100 * row.difference)}" cy="{y}" r="4.5" fill="{colour}"/>')
        figures = with_error(row.difference, row.error, "+.2f")
        parts.append(f'<text x="{width - 12}" y="{y + 4}" text-anchor="end">{figures}</text></g>')
    parts.append(
        f'<text x="{left + _PLOT / 2}" y="{bottom + 34}" text-anchor="middle">'
        f"points of top-1 more than {escape(experiment.baseline)}</text></g></svg>\n"
    )
    return "\n".join(parts)


def _title(rows: Sequence[Comparison], experiment: Experiment) -> str:
    base = next((row for row in rows if row.variant == experiment.baseline and row.top1), None)
    if base is None:
        return experiment.baseline
    seeds = f"{len(base.top1)} seed{'s' * (len(base.top1) > 1)}"
    return f"{experiment.baseline}: {100 * base.mean:.2f} % top-1 after {base.epochs} epochs, {seeds}"


def _ends(row: Comparison) -> tuple[float, float]:
    """The mean less and plus a standard error, in points; twice the mean for one seed."""
    error = row.error if len(row.differences) > 1 else 0.0
    return 100 * (row.difference - error), 100 * (row.difference + error)


def _signed(points: float) -> str:
    return f"{points:+g}" if points else "0"


def _step(span: float) -> float:
    """The distance of the grid's lines: 1, 2 or 5 times a power of ten, so that about five of them span the values."""
    rough = max(span, 0.1) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999)
