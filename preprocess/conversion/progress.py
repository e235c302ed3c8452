"""How far a conversion is, on stderr: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from sdpnet.pipelines.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Meter"]


class Meter:
    """The progress of one split: images done of all, images/s of this run, bad ones, time left.

    Args:
        name: of the split.
        done: images that an earlier run has done.
        total: images of the split.
    """

    def __init__(self, name: str, done: int, total: int) -> None:
        name = printable(name)
        self._name, self._earlier, self._done, self._total = name, done, done, total
        self._began = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(name, total=total, completed=done, note="")
        elif done:
            print(f"{name}: {done:,} of {total:,} images are done already", file=sys.stderr, flush=True)

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bad: int) -> None:
        """One more image is done; `num_bad` of all were bad."""
        self._done += 1
        now = time.monotonic()
        if now - self._shown < (10 if self._bar is None else 0.1) and self._done < self._total:
            return
        self._shown = now
        bad = f", {num_bad:,} bad" if num_bad else ""
        rate = (self._done - self._earlier) / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=f"{rate:,.0f} images/s{bad}")
        else:
            left = _duration((self._total - self._done) / rate)
            line = f"{self._name}: {self._done:,} of {self._total:,} images, {rate:,.0f} images/s{bad}, {left} left"
            print(line, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        text = printable(text)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=text)
        else:
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)


def _bar() -> Progress:
    from rich.console import Console  # takes a tenth of the start of a build command
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    note = TextColumn("{task.fields[note]}", markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        note,
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
