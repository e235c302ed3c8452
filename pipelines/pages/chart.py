"""A chart of a page: a figure for Plotly, and a table of its values for whoever cannot see it drawn."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sdpnet.pipelines.errors import printable

__all__ = ["Chart", "layout", "plotly_text"]

LONGEST_NAME: Final = 40  # characters beside the mouse


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: its heading.
        description: what it shows, for people who hear the page.
        figure: `data` and `layout` as in Plotly's figure reference, made of dicts, lists, text and finite numbers.
        head: the table's column names, the first one above the rows' names.
        rows: the table's rows, each with its name first.
        note: a line below the chart; "" is none.
    """

    title: str
    description: str
    figure: Mapping[str, Any]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def layout(x_axis: Mapping[str, Any], y_axis: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The layout that all charts share. Colours come from the page's style, when it is drawn."""
    axis = {"automargin": True, "exponentformat": "SI", "minexponent": 4, "showline": False}
    return {
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "showlegend": False,
        "hoverlabel": {"namelength": -1},
        "xaxis": {**axis, "showgrid": False, "ticks": "outside", "zeroline": False, **x_axis},
        "yaxis": {**axis, "nticks": 6, **y_axis},
        **more,
    }


def plotly_text(text: str) -> str:
    """Text that Plotly shows as it is: without this it would read some HTML in it. Its middle is left out where it is
    long, here, because Plotly would cut in the middle of an escape."""
    text = printable(text)
    if len(text) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        text = f"{text[:half]}…{text[-half:]}"
    return html.escape(text, quote=False)
