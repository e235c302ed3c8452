"""Shows the progress of a conversion on stderr: a bar on a terminal, otherwise a line every ten seconds.

With `--quiet` it shows nothing.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from sdpnet.pipelines.errors import printable
from sdpnet.pipelines.lasting_output import print_note
from sdpnet.pipelines.terminal.quiet import is_quiet

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Meter"]


class Meter:
    """The progress of one split: finished images, images/s of this run, bad images, and remaining time.

    Args:
        name: the name of the split.
        done: the number of images that an earlier run has converted.
        total: the number of images of the split.
    """

    def __init__(self, name: str, done: int, total: int) -> None:
        name = printable(name)
        self._name, self._earlier, self._done, self._total = name, done, done, total
        self._start_time = self._last_shown = time.monotonic()
        self._bar: Progress | None = None
        self._quiet = is_quiet()
        if self._quiet:
            return
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(name, total=total, completed=done, note="")
        elif done:
            print_note(f"{name}: {done:,} of {total:,} images are done already")

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bad: int, count: int = 1) -> None:
        """Counts finished images, one by default. `num_bad` is the number of bad images so far."""
        self._done += count
        now = time.monotonic()
        if self._quiet:
            return
        if now - self._last_shown < (10 if self._bar is None else 0.1) and self._done < self._total:
            return
        self._last_shown = now
        bad = f", {num_bad:,} bad" if num_bad else ""
        rate = (self._done - self._earlier) / max(now - self._start_time, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=f"{rate:,.0f} images/s{bad}")
        else:
            remaining = _duration((self._total - self._done) / rate)
            counts = f"{self._done:,} of {self._total:,} images, {rate:,.0f} images/s{bad}"
            line = f"{self._name}: {counts}, {remaining} left"
            print_note(line)

    def note(self, text: str) -> None:
        """Shows a text instead of the rate."""
        text = printable(text)
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=text)
        else:
            print_note(f"{self._name}: {text}")


def _bar() -> Progress:
    # Imported here, because it takes a tenth of the start-up of a build command and is needed on a terminal only.
    from rich.console import Console
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
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
