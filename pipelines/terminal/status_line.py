"""One line on the terminal that says what is being done, without a thread that would disturb measurements."""

from __future__ import annotations

import shutil
import sys

from sdpnet.pipelines.errors import printable

__all__ = ["StatusLine"]


class StatusLine:
    """Call it with a text; leaving the context takes the line away. Silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> StatusLine:
        return self

    def __call__(self, text: str) -> None:
        if self._shown:
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{printable(text)[: width - 1]}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self("")
