"""Describes in words how the images of a shard set are stored, by which libraries, and how large its classes are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from sdpnet.preprocess.inspection.survey import Survey
from sdpnet.preprocess.inspection.text import counted

__all__ = ["class_counts", "how_stored", "written_by"]

_REENCODE: Final = {
    "always": "all encoded anew",
    "auto": "JPEGs that are small enough kept without loss",
    "never": "all kept without loss",
    "in place": "where they lie, as they are",
}
_EXIF: Final = {"ignore": "pixels as the files have them, EXIF orientation ignored", "apply": "turned upright by EXIF"}


def how_stored(encode: Mapping[str, Any]) -> str:
    """Describes the settings of the encoder. A setting that is unknown here is given as its name and its value."""
    words, remaining = [], dict(encode)

    def describe(key: str, text: str | None) -> None:
        if text is not None:
            words.append(text)
            del remaining[key]

    quality, subsampling = remaining.get("quality"), remaining.get("subsampling")
    if isinstance(quality, int) and isinstance(subsampling, str):
        describe("quality", f"JPEGs of quality {quality} with chroma {subsampling}")
        del remaining["subsampling"]
    side = remaining.get("max_side")
    if isinstance(side, int):
        describe("max_side", f"the longer side at most {side:,} pixels" if side else "every image at its own size")
    describe("reencode", _REENCODE.get(str(remaining.get("reencode"))))
    describe("exif", _EXIF.get(str(remaining.get("exif"))))
    rows = remaining.get("restart_rows")
    if isinstance(rows, int):
        known = {0: "no restart markers", 1: "a restart marker at each row of blocks, for fast crops"}
        describe("restart_rows", known.get(rows, f"a restart marker at every {rows:,} rows of blocks, for fast crops"))
    if remaining.get("encoder") == "another program":
        describe("encoder", "as another program encoded them")
    return "; ".join([*words, *(f"{key.replace('_', ' ')} {value}" for key, value in remaining.items())])


def written_by(created_by: str) -> str:
    """Describes the libraries that determined the encoded bytes."""
    return re.sub(r"^native codec (\d+),", r"sdpnet's own JPEG codec (version \1) with", created_by)


def class_counts(survey: Survey) -> list[str]:
    """A line for each split on the sizes of its classes: the common size, or the largest and the smallest class."""
    names, lines = survey.class_names, []
    for split in survey.splits:
        order = [label for label in split.by_count() if split.class_counts[label]]
        empty = split.empty_classes
        if not order:
            continue
        largest, smallest = (int(split.class_counts[order[end]]) for end in (0, -1))
        if largest != smallest:
            ends = f"most images of {names[order[0]]} ({largest:,}), fewest of {names[order[-1]]} ({smallest:,})"
            lines.append(f"{split.name}: {ends}")
        else:
            which = "each class that has any" if empty else f"each of {counted(len(order), 'class', 'classes')}"
            lines.append(f"{split.name}: {counted(largest, 'image', 'images')} of {which}")
        if empty:
            without = counted(len(empty), "class", "classes")
            lines.append(f"{split.name}: no image of {without}, the first {names[empty[0]]}")
    return lines
