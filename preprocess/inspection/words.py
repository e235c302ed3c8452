"""Facts about a shard set in words for people: how its images are stored, by what, and how its classes are filled."""

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
}
_EXIF: Final = {"ignore": "pixels as the files have them, EXIF orientation ignored", "apply": "turned upright by EXIF"}


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


def written_by(created_by: str) -> str:
    """The libraries that decided the encoded bytes, in words."""
    return re.sub(r"^native codec (\d+),", r"sdpnet's own JPEG codec (version \1) with", created_by)


def class_counts(survey: Survey) -> list[str]:
    """A line for each split on how its images are spread over the classes: equally, or from the most to the fewest."""
    names, lines = survey.class_names, []
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
