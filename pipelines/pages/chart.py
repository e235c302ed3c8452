"""A chart of a page: a figure for Plotly, and a table of its values for readers who cannot see the figure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sdpnet.pipelines.errors import printable

__all__ = ["Chart", "layout", "plotly_text"]

LONGEST_NAME: Final = 40  # characters in the label beside the mouse


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: the heading.
        description: what the chart shows, for screen readers.
        figure: `data` and `layout` as in Plotly's figure reference, made of dicts, lists, text and finite numbers.
        head: the table's column names; the first one stands above the rows' names.
        rows: the table's rows; the first cell of each is its name.
        note: a line below the chart, or "" for none.
    """

    title: str
    description: str
    figure: Mapping[str, Any]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def layout(x_axis: Mapping[str, Any], y_axis: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The layout that all charts share. The colours are taken from the page's style when the page is shown.

    Args:
        x_axis, y_axis: settings of the axes that differ from the shared ones.
        more: further settings of Plotly's layout.
    """
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
    """Escapes text for Plotly, which interprets some HTML in texts.

    A long text loses its middle here, because Plotly would cut it in the middle of an escape.
    """
    text = printable(text)
    if len(text) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        text = f"{text[:half]}…{text[-half:]}"
    return html.escape(text, quote=False)
