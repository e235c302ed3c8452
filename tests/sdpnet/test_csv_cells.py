from __future__ import annotations

import pytest

from sdpnet.reporting.csv_cells import csv_cell


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("tench", "tench"),
        ("ümlaut", "ümlaut"),
        ("=1+1", "'=1+1"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\\t=1"),
        ("\r=1", "'\\r=1"),
        (" =1", "' =1"),
        ("\u00a0=1", "'\u00a0=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-17", "-17"),
        ("+1.5e-3", "+1.5e-3"),
        ("-inf", "'-inf"),
        ("-1\n=2", "'-1\\n=2"),
        ("a\nb\x1b[2J\u202e", "a\\nb\\x1b[2J\\u202e"),
        ("\udce9\ud800", "\\xe9\\ud800"),
        ("", ""),
    ],
)
def test_a_cell_is_text(name: str, cell: str) -> None:
    assert csv_cell(name) == cell
