"""How wide a chart's label is, so that a page can make room for it without knowing the reader's font."""

from __future__ import annotations

from typing import Final

__all__ = ["FONT_SIZE", "label_width"]

FONT_SIZE: Final = 12.0  # of the labels in the pages' charts, in SVG units
# Shares of the font size, in DejaVu Sans: the widest of the fonts that the pages ask for, or are shown in instead.
_WIDTHS: Final = {**dict.fromkeys(".,: ", 0.34), "-": 0.37, "+": 0.84, "%": 0.96, "k": 0.58, "G": 0.78, "M": 0.87}
_OTHER: Final = 0.64  # digits, e


def label_width(text: str) -> float:
    """At most how wide a label of digits, signs and units is, in SVG units."""
    return FONT_SIZE * sum(_WIDTHS.get(char, _OTHER) for char in text)
