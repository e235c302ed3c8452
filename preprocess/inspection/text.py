"""The texts that the terminal and the page have in common: numbers with units, and the table of the splits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdpnet.preprocess.inspection.survey import SplitSurvey, Survey

__all__ = ["counted", "file_size", "left_out", "left_out_kinds", "split_rows"]


def counted(count: int, one: str, many: str) -> str:
    """A number followed by its noun, in the singular or the plural."""
    return f"{count:,} {one if count == 1 else many}"


def file_size(count: float) -> str:
    """A number of bytes in decimal units with three digits."""
    for power, unit in enumerate(("bytes", "kB", "MB", "GB")):
        if count < 999.5 * 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count / 1e12:,.3g} TB"


def split_rows(survey: Survey) -> list[tuple[str, list[str]]]:
    """The rows of the table of splits: the name of each quantity and its text for each split."""

    def spread(values: np.ndarray, form: str = ",.0f") -> str:
        if not len(values):
            return "-"
        low, middle, high = (format(float(v), form) for v in (values.min(), np.median(values), values.max()))
        return low if low == high else f"{low} to {high}, median {middle}"

    rows: list[tuple[str, Callable[[SplitSurvey], str]]] = [
        ("images", lambda s: f"{s.split.num_samples:,}"),
        ("left out", lambda s: f"{s.split.num_quarantined:,}"),
        ("classes with images", lambda s: f"{np.count_nonzero(s.class_counts):,} of {len(s.class_counts):,}"),
        ("images a class", lambda s: spread(s.class_counts)),
        ("longer side, pixels", lambda s: spread(s.longer)),
        ("shorter side, pixels", lambda s: spread(s.shorter)),
        ("width / height", lambda s: spread(s.aspect, ".2f")),
        ("bytes an image", lambda s: spread(s.nbytes)),
        ("bytes an image, mean", lambda s: f"{s.nbytes.mean():,.0f}" if len(s.nbytes) else "-"),
        ("bytes of all images", lambda s: f"{int(s.nbytes.sum()):,}"),
        ("bytes of the files", lambda s: f"{s.file_bytes:,}"),
    ]
    if any(split.split.num_kept for split in survey.splits):
        rows.insert(1, ("passed through losslessly", lambda s: f"{s.split.num_kept:,}"))
    return [(label, [cell(split) for split in survey.splits]) for label, cell in rows]


def left_out(survey: Survey) -> str:
    """Says how many images and other files of the source are not in the set."""
    expected = sum(split.split.num_quarantined for split in survey.splits)
    listed = sum(group.count for group in survey.quarantine)
    origin = survey.manifest.origin
    others = 0 if origin is None else origin.num_left_out
    if expected != listed:
        return f"{counted(expected, 'image', 'images')} left out, but quarantine.jsonl lists {listed:,}."
    sentences = []
    if listed:
        sentences.append(f"{counted(listed, 'image', 'images')} of the source left out.")
    if others:
        sentences.append(f"{counted(others, 'other file', 'other files')} of the source left out.")
    return " ".join(sentences) or "No image was left out."


def left_out_kinds(survey: Survey) -> list[str]:
    """A line for each kind of other files of the source that are not in the set."""
    origin = survey.manifest.origin
    return [] if origin is None else [str(entry) for entry in origin.left_out]
