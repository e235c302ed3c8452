"""What the terminal and the page say alike: numbers with their units, and the table of the splits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from preprocess.survey import SplitSurvey, Survey

__all__ = ["class_counts", "counted", "file_size", "how_stored", "left_out", "split_rows", "written_by"]


def counted(count: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{count:,} {one if count == 1 else many}"


def file_size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for power, unit in enumerate(("bytes", "kB", "MB", "GB")):
        if count < 999.5 * 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count / 1e12:,.3g} TB"


def split_rows(survey: Survey) -> list[tuple[str, list[str]]]:
    """The table of splits: for each fact its name and its text for each split."""

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
    """One sentence on the images of the source that could not be converted."""
    announced = sum(split.split.num_quarantined for split in survey.splits)
    listed = sum(group.count for group in survey.quarantine)
    if announced != listed:
        return f"{counted(announced, 'image', 'images')} left out, but quarantine.jsonl lists {listed:,}."
    return f"{counted(listed, 'image', 'images')} of the source left out." if listed else "No image was left out."


def how_stored(encode: Mapping[str, Any]) -> str:
    """The settings of a set's encoder in words; one that is not known here by its name and value."""
    words, rest = [], dict(encode)

    def said(key: str, text: str | None) -> None:
        if text is not None:
            words.append(text)
            del rest[key]

    quality, subsampling = rest.get("quality"), rest.get("subsampling")
    if isinstance(quality, int) and isinstance(subsampling, str):
        said("quality", f"JPEGs of quality {quality} with chroma {subsampling}")
        del rest["subsampling"]
    side = rest.get("max_side")
    if isinstance(side, int):
        said("max_side", f"the longer side at most {side:,} pixels" if side else "every image at its own size")
    said("reencode", _REENCODE.get(str(rest.get("reencode"))))
    said("exif", _EXIF.get(str(rest.get("exif"))))
    rows = rest.get("restart_rows")
    if isinstance(rows, int):
        every = {0: "no restart markers", 1: "a restart marker at each row of blocks, for fast crops"}
        said("restart_rows", every.get(rows, f"a restart marker at every {rows:,} rows of blocks, for fast crops"))
    if rest.get("encoder") == "another program":
        said("encoder", "as another program encoded them")
    return "; ".join([*words, *(f"{key.replace('_', ' ')} {value}" for key, value in rest.items())])


_REENCODE = {
    "always": "all encoded anew",
    "auto": "JPEGs that are small enough kept without loss",
    "never": "all kept without loss",
}
_EXIF = {"ignore": "pixels as the files have them, EXIF orientation ignored", "apply": "turned upright by EXIF"}


def written_by(created_by: str) -> str:
    """The libraries that decided the encoded bytes, in words."""
    return re.sub(r"^native codec (\d+),", r"sdpnet's own JPEG codec (version \1) with", created_by)


def class_counts(survey: Survey) -> list[str]:
    """A line for each split on how its images are spread over the classes: equally, or from the most to the fewest."""
    names, lines = survey.manifest.classes, []
    for split in survey.splits:
        order = [label for label in split.by_count() if split.class_counts[label]]
        empty = split.empty_classes
        if not order:
            continue
        most, fewest = (int(split.class_counts[order[end]]) for end in (0, -1))
        if most != fewest:
            ends = f"most images of {names[order[0]]} ({most:,}), fewest of {names[order[-1]]} ({fewest:,})"
            lines.append(f"{split.name}: {ends}")
        else:
            which = "each class that has any" if empty else f"each of {counted(len(order), 'class', 'classes')}"
            lines.append(f"{split.name}: {counted(most, 'image', 'images')} of {which}")
        if empty:
            without = counted(len(empty), "class", "classes")
            lines.append(f"{split.name}: no image of {without}, the first {names[empty[0]]}")
    return lines
