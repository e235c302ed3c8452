"""The page about a shard set: one self-contained HTML file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.pages.chart import Chart
from sdpnet.pipelines.pages.document import render
from sdpnet.preprocess.inspection.charts import histogram, linear_axis, ratio_axis
from sdpnet.preprocess.inspection.contact_sheet import ContactSheet
from sdpnet.preprocess.inspection.survey import SplitSurvey, Survey
from sdpnet.preprocess.inspection.text import counted, file_size, left_out, left_out_kinds, split_rows
from sdpnet.preprocess.inspection.words import how_stored, written_by

__all__ = ["page"]

BARS_UP_TO: Final = 40  # the largest number of classes with a bar each; for more there is a histogram
NAMES_LISTED: Final = 10
REASONS_LISTED: Final = 20

TEMPLATE: Final = Path(__file__).with_name("page.html.j2")


def page(survey: Survey, reading: Sequence[tuple[str, str, str]], sheet: ContactSheet | None) -> str:
    """Returns the HTML document.

    Args:
        survey: the survey of the shard set.
        reading: additional key figures: (name, value, remark) each.
        sheet: the contact sheet; None omits it.
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
        ("images", f"{survey.num_samples:,}", "in " + ", ".join(split.name for split in survey.splits)),
        ("classes", f"{manifest.num_classes:,}", ""),
        ("on disk", file_size(survey.file_bytes), f"{survey.file_bytes:,} bytes"),
        ("bytes an image", mean, "mean, encoded"),
        *reading,
    ]
    return render(
        TEMPLATE,
        source=manifest.source,
        figures=figures,
        origin=origin,
        splits=[split.name for split in survey.splits],
        split_rows=split_rows(survey),
        classes=[_classes(split, survey.class_names) for split in survey.splits],
        sizes=_sizes(survey),
        sheet=None if sheet is None else _sheet(sheet),
        left_out=left_out(survey),
        reasons=survey.quarantine[:REASONS_LISTED],
        more_reasons=_more_reasons(survey),
        left_out_kinds=left_out_kinds(survey),
    )


def _classes(split: SplitSurvey, names: Sequence[str]) -> dict[str, Any]:
    """The distribution of the images of a split over the classes, for the template.

    There is a bar for each class if there are few; otherwise a histogram and the names of the largest and the smallest
    classes. Classes without images are listed separately.
    """
    counts, empty = split.class_counts, split.empty_classes
    found: dict[str, Any] = {
        "split": split.name,
        "num_classes": f"{len(names):,}",
        "num_empty": f"{len(empty):,}" if empty else "",
        "empty": [names[label] for label in empty[:NAMES_LISTED]],
        "more_empty": f"{len(empty) - NAMES_LISTED:,}" if len(empty) > NAMES_LISTED else "",
    }
    if len(names) <= BARS_UP_TO:
        largest = max(counts.tolist(), default=0)
        rows = [(names[label], int(counts[label])) for label in split.by_count()]
        found["bars"] = [(name, f"{100 * count / largest:.1f}" if count else "", f"{count:,}") for name, count in rows]
    elif counts.min() == counts.max():
        found["each"] = f"{int(counts[0]):,}"
    else:
        order = [label for label in split.by_count() if counts[label]]
        half = NAMES_LISTED // 2 if len(order) > NAMES_LISTED else len(order)
        ends = [(names[label], f"{int(counts[label]):,}") for label in order]
        found["most"], found["fewest"] = ends[:half], ends[half:][-half:]
        found["between"] = f"{len(order) - NAMES_LISTED:,}" if len(order) > NAMES_LISTED else ""
        title = f"{split.name}: images of a class"
        found["chart"] = histogram(counts, linear_axis(counts, "images a class"), "classes", title)
    return found


def _sizes(survey: Survey) -> list[Chart]:
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
            charts.append(histogram(measured, axis, "images", f"{split.name}: {title}"))
    return charts


def _sheet(sheet: ContactSheet) -> dict[str, Any]:
    def url(jpeg: bytes) -> str:
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"

    tiles = [
        {
            "sample_id": tile.sample_id,
            "class_name": tile.class_name,
            "size": f"{tile.width} × {tile.height}",
            "change": tile.change,
            "original": url(tile.original),
            "augmented": None if tile.augmented is None else url(tile.augmented),
        }
        for tile in sheet.tiles
    ]
    return {"split": sheet.split, "num": counted(len(tiles), "image", "images"), "note": sheet.note, "tiles": tiles}


def _more_reasons(survey: Survey) -> str:
    rest = survey.quarantine[REASONS_LISTED:]
    return f"And {len(rest):,} more reasons, for {sum(group.count for group in rest):,} images." if rest else ""
