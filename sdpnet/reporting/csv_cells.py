"""Names as cells of a CSV file that spreadsheets and terminals always treat as text."""

from __future__ import annotations

import re
from typing import Final

from sdpnet.pipelines.errors import printable

__all__ = ["csv_cell"]

# Spreadsheets treat a cell that begins with one of these characters as a formula (OWASP, "CSV Injection"); in East
# Asian locales the wide forms count too. Some spreadsheets skip blanks at the start.
_FORMULA: Final = re.compile(r"\s*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def csv_cell(name: str) -> str:
    """The name as a cell: control characters are escaped (`printable`), and a formula gets an apostrophe before it.

    Numbers do not change.
    """
    text = printable(name)
    is_formula = _FORMULA.match(name) is not None or _FORMULA.match(text) is not None
    return f"'{text}" if is_formula and _NUMBER.fullmatch(name) is None else text
