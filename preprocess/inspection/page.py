"""The page about a shard set: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.errors import printable
from sdpnet.preprocess.inspection.charts import histogram, linear_axis, ratio_axis
from sdpnet.preprocess.inspection.contact_sheet import ContactSheet
from sdpnet.preprocess.inspection.survey import Bad, SplitSurvey, Survey
from sdpnet.preprocess.inspection.text import counted, file_size, left_out, left_out_kinds, split_rows
from sdpnet.preprocess.inspection.words import how_stored, written_by

__all__ = ["page"]

BARS_UP_TO: Final = 40  # classes; more make a histogram
NAMES_LISTED: Final = 10
REASONS_LISTED: Final = 20

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c1c1f; --muted: #65656c; --line: #e2e2e6; --paper: #fff; --bar: #3f6f9f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e9; --muted: #9d9da6; --line: #35353c; --paper: #17171a; --bar: #7ba4cf }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.25; font-weight: 600; margin: 0 }
h2 { font-size: 1.2rem; font-weight: 600; margin: 3rem 0 1rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem }
p { margin: 0 0 1rem; max-width: 46rem }
.muted, figcaption small, dt, th { color: var(--muted); font-weight: 400 }
.name { unicode-bidi: isolate }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.25rem; margin: 2rem 0 }
.figures dt { font-size: .85rem }
.figures dd { margin: 0; font-size: 1.35rem; line-height: 1.3 }
.figures dd small { display: block; font-size: .85rem; color: var(--muted) }
.origin { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0 }
.origin dd { margin: 0 }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem 0 .3rem 1rem }
th:first-child, td:first-child { padding-left: 0 }
.splits th, .splits td { border-bottom: 1px solid var(--line) }
.splits thead th { color: var(--ink); font-weight: 600 }
.count { width: 1%; white-space: nowrap; text-align: right }
.bars td { padding-top: .15rem; padding-bottom: .15rem }
.bars .bar { width: 55% }
.bars .bar div { height: .7rem; margin-top: .4rem; background: var(--bar); min-width: 1px }
.extremes { margin-top: 1.5rem }
figure { margin: 0 }
figcaption { line-height: 1.4 }
figcaption small { display: block; font-size: .85rem }
svg { display: block; width: 100%; height: auto; font-size: 12px; margin: .5rem 0 0 }
svg text { fill: var(--ink) }
svg .label { fill: var(--muted) }
svg rect { fill: var(--bar) }
svg .grid { stroke: var(--line) }
svg .tick { stroke: var(--muted) }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1.75rem 1.5rem }
.images { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; margin-bottom: .4rem; align-items: end }
.images img { display: block; width: 100%; aspect-ratio: 1; height: auto; object-fit: contain; object-position: bottom }
.images img:only-child { grid-column: 1 / -1 }
.reasons { list-style: none; margin: 0; padding: 0 }
.reasons > li { margin-bottom: 1.25rem }
.reasons ul { margin: .25rem 0 0; padding-left: 1.25rem; color: var(--muted) }
"""


def page(survey: Survey, reading: Sequence[tuple[str, str, str]], sheet: ContactSheet | None) -> str:
    """The whole HTML document.

    Args:
        survey: what the shard set holds.
        reading: further key figures: (name, value, remark) each.
        sheet: None leaves the contact sheet out.
    """
    manifest = survey.manifest
    origin = [
        ("source", manifest.source),
        ("stored as", how_stored(manifest.encode)),
        ("written by", written_by(manifest.created_by)),
    ]
    if manifest.origin is not None:
        splits = ", ".join(f"{split.name} {manifest.origin.place(split.name)}" for split in survey.splits)
        origin.insert(1, ("splits", splits))
    num_bytes = sum(int(split.nbytes.sum()) for split in survey.splits)
    mean = file_size(num_bytes / survey.num_samples) if survey.num_samples else "-"
    figures = [
        ("images", f"{survey.num_samples:,}", f"in {_named_splits(survey)}"),
        ("classes", f"{manifest.num_classes:,}", ""),
        ("on disk", file_size(survey.file_bytes), f"{survey.file_bytes:,} bytes"),
        ("bytes an image", mean, "mean, encoded"),
        *reading,
    ]
    sections = [
        _section("Splits", _split_table(survey)),
        _section("Classes", *_classes(survey)),
        _section("Images", _sizes(survey)),
        "" if sheet is None else _section("Contact sheet", *_sheet(sheet)),
        _section("Left out", *_quarantine(survey)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{_text(manifest.source)}: shard set</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{_name(manifest.source)}</h1>\n<dl class="figures">\n'
        + "".join(
            f"<div><dt>{name}</dt><dd>{_text(value)}<small>{_text(remark)}</small></dd></div>\n"
            for name, value, remark in figures
        )
        + '</dl>\n<dl class="origin">'
        + "".join(f"<dt>{name}</dt><dd>{_name(value)}</dd>" for name, value in origin)
        + "</dl>\n"
        + "".join(sections)
        + "</main>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def _name(value: object) -> str:
    """Text that comes from the data, kept apart from the direction of the text around it."""
    return f'<span class="name">{_text(value)}</span>'


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>\n"


def _named_splits(survey: Survey) -> str:
    return ", ".join(printable(split.name) for split in survey.splits)


def _listed(names: Iterable[str], total: int) -> str:
    text = ", ".join(names)
    return f"{text} and {total - NAMES_LISTED:,} more" if total > NAMES_LISTED else text


def _split_table(survey: Survey) -> str:
    head = "".join(f'<th scope="col">{_name(split.name)}</th>' for split in survey.splits)
    rows = "".join(
        f'<tr><th scope="row">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for label, cells in split_rows(survey)
    )
    return f'<table class="splits">\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>'


def _classes(survey: Survey) -> list[str]:
    names = survey.class_names
    few = len(names) <= BARS_UP_TO
    parts = []
    for split in survey.splits:
        if empty := split.empty_classes:
            listed = _listed((_name(names[label]) for label in empty[:NAMES_LISTED]), len(empty))
            parts.append(
                f"<p>{_name(split.name)} has no image of {len(empty):,} of {len(names):,} classes: {listed}.</p>"
            )
    charts = [_class_bars(split, names) if few else _class_histogram(split, names) for split in survey.splits]
    return [*parts, '<div class="pairs">', *charts, "</div>"]


def _class_bars(split: SplitSurvey, names: Sequence[str]) -> str:
    most = max(split.class_counts.tolist(), default=0)
    rows = ""
    for label in split.by_count():
        count = int(split.class_counts[label])
        bar = f'<div style="width: {100 * count / most:.1f}%"></div>' if count else ""
        rows += f'<tr><td>{_name(names[label])}</td><td class="bar">{bar}</td><td class="count">{count:,}</td></tr>\n'
    return f'<div><h3>{_name(split.name)}: images of each class</h3>\n<table class="bars">\n{rows}</table></div>'


def _class_histogram(split: SplitSurvey, names: Sequence[str]) -> str:
    """The histogram, and by name the classes at both ends of it; empty ones are named elsewhere."""
    title = f"<h3>{_name(split.name)}: images of a class</h3>"
    counts = split.class_counts
    if counts.min() == counts.max():
        return f"<div>{title}<p>Each of the {len(counts):,} classes has {int(counts[0]):,}.</p></div>"
    order = [label for label in split.by_count() if counts[label]]
    rows = [
        f'<tr><td>{_name(names[label])}</td><td class="count">{int(counts[label]):,}</td></tr>\n' for label in order
    ]
    if between := max(0, len(rows) - NAMES_LISTED):
        half = NAMES_LISTED // 2
        rows[half:-half] = [f'<tr><td class="muted">{between:,} classes between</td><td></td></tr>\n']
    chart = histogram(counts, linear_axis(counts, "images a class"), "classes")
    return f'<div>{title}\n{chart}\n<table class="bars extremes">\n{"".join(rows)}</table></div>'


def _sizes(survey: Survey) -> str:
    kinds: list[tuple[str, Callable[[SplitSurvey], np.ndarray], Any, str]] = [
        ("longer side", lambda s: s.longer, linear_axis, "pixels"),
        ("shorter side", lambda s: s.shorter, linear_axis, "pixels"),
        ("aspect ratio", lambda s: s.aspect, ratio_axis, "width : height"),
        ("encoded size", lambda s: s.nbytes, linear_axis, "bytes"),
    ]
    charts = []
    for title, measure, make_axis, unit in kinds:
        values = [measure(split) for split in survey.splits]
        axis = make_axis(np.concatenate(values) if values else np.zeros(0), unit)
        for split, measured in zip(survey.splits, values, strict=True):
            charts.append(f"<div><h3>{_name(split.name)}: {title}</h3>\n{histogram(measured, axis, 'images')}</div>\n")
    return f'<div class="pairs">\n{"".join(charts)}</div>'


def _sheet(sheet: ContactSheet) -> list[str]:
    of = f"{counted(len(sheet.tiles), 'image', 'images')} of {_name(sheet.split)}."

    def image(jpeg: bytes, what: str) -> str:
        return f'<img alt="{what}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'

    tiles = []
    for tile in sheet.tiles:
        images = image(tile.original, f"sample {tile.sample_id}")
        if tile.augmented is not None:
            images += image(tile.augmented, f"sample {tile.sample_id}, augmented")
        tiles.append(
            f'<figure><div class="images">{images}</div><figcaption>{tile.sample_id}: {_name(tile.class_name)}'
            f"<small>{tile.width} × {tile.height}{'; ' if tile.change else ''}{_text(tile.change)}</small>"
            "</figcaption></figure>\n"
        )
    note = f"<p>{of} {_text(sheet.note)} Sizes are width × height in pixels.</p>"
    return [note, '<div class="sheet">', *tiles, "</div>"]


def _quarantine(survey: Survey) -> list[str]:
    parts = [f"<p>{left_out(survey)}</p>"]
    if survey.quarantine:
        parts += ['<ul class="reasons">', *map(_reason, survey.quarantine[:REASONS_LISTED]), "</ul>"]
    if rest := survey.quarantine[REASONS_LISTED:]:
        parts.append(f"<p>And {len(rest):,} more reasons, for {sum(group.count for group in rest):,} images.</p>")
    if kinds := left_out_kinds(survey):
        parts.append("<ul>" + "".join(f"<li>{_name(line)}</li>\n" for line in kinds) + "</ul>")
    return parts


def _reason(group: Bad) -> str:
    files = "".join(f"<li>{_name(file)}</li>" for file in group.files)
    more = group.count - len(group.files)
    files += f"<li>and {more:,} more</li>" if more else ""
    return f"<li>{_name(group.reason)}: {group.count:,}\n<ul>{files}</ul></li>"
