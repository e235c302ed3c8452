"""Names as cells of a CSV file: text in every spreadsheet and terminal, whatever is in them."""

from __future__ import annotations

import re
from typing import Final

from sdpnet.pipelines.errors import printable

__all__ = ["csv_cell"]

# Spreadsheets take a cell that begins so for a formula (OWASP, "CSV Injection"), in East Asian locales also where the
# characters are wide ones. Some of them skip blanks at the start.
_FORMULA: Final = re.compile(r"\s*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def csv_cell(name: str) -> str:
    """The name without what acts on a terminal (`printable`), and with an apostrophe before it where it would be taken
    for a formula. Numbers stay as they are."""
    text = printable(name)
    is_formula = _FORMULA.match(name) is not None or _FORMULA.match(text) is not None
    return f"'{text}" if is_formula and _NUMBER.fullmatch(name) is None else text
