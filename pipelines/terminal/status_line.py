"""A status line on the terminal, without a thread, which would disturb measurements."""

from __future__ import annotations

import shutil
import sys

from sdpnet.pipelines.errors import printable
from sdpnet.pipelines.lasting_output import print_note
from sdpnet.pipelines.terminal.quiet import is_quiet

__all__ = ["StatusLine"]


class StatusLine:
    """A context manager that shows a text when it is called with one, and removes it at the end.

    It shows nothing if stderr is not a terminal, or with `--quiet`.
    """

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty() and not is_quiet()

    def __enter__(self) -> StatusLine:
        return self

    def __call__(self, text: str) -> None:
        if self._shown:
            width = shutil.get_terminal_size().columns
            print_note(f"\r\x1b[K{printable(text)[: width - 1]}", end="")

    def __exit__(self, *_: object) -> None:
        self("")
