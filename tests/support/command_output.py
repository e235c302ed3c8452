"""Assertions about the output of a command."""

from __future__ import annotations

import pytest

__all__ = ["one_line"]


def one_line(code: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Requires that a command has ended with status 2 and one error line, which contains all `words`."""
    stderr = capsys.readouterr().err
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    assert all(word in lines[0] for word in words), lines[0]
