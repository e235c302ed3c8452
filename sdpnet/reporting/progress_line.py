"""The progress of training as one line on a terminal of any width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.text import Text

__all__ = ["ProgressLine"]

_GAP = "  "
_BAR_WIDTHS = (10, 40)  # cells: at least, at most


class ProgressLine(Progress):
    """Shows epoch, bar, step counter, remaining time, and the details that are passed to `show`.

    On a narrow terminal, parts are omitted. The order of importance is: counter, epoch, remaining time, the first two
    details, the bar, the other details.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, transient=True)
        self._shown: TaskID | None = None
        self._details: Sequence[str] = ()

    def begin(self, epoch: int, step: int, steps: int) -> None:
        """Starts the line of an epoch, which counts from 1. `step` of its `steps` steps are done already."""
        if self._shown is not None:
            self.remove_task(self._shown)
        self._shown = self.add_task(f"epoch {epoch}", total=steps, completed=step)

    def step(self) -> None:
        if self._shown is not None:
            self.advance(self._shown)

    def show(self, details: Sequence[str]) -> None:
        """Sets the details, in the order of their importance."""
        self._details = details

    def get_renderables(self) -> Iterable[RenderableType]:
        return [_Line(task, self._details) for task in self.tasks]


class _Line:
    def __init__(self, task: Task, details: Sequence[str]) -> None:
        self._task, self._details = task, details

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        task, width = self._task, options.max_width
        total = int(task.total or 0)
        seconds = task.time_remaining
        remaining = "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))
        counter = f"{int(task.completed):>{len(str(total))}}/{total}"
        shown = {"counter": counter}
        used = len(counter)
        bar = 0
        optional = [("epoch", task.description), ("remaining", remaining), *((d, d) for d in self._details)]
        optional.insert(min(len(optional), 4), ("bar", " " * _BAR_WIDTHS[0]))
        for name, text in optional:
            gap = len(_GAP) if name in self._details else 1
            if used + gap + len(text) <= width:
                shown[name] = text
                used += gap + len(text)
        if "bar" in shown:
            bar = min(_BAR_WIDTHS[1], _BAR_WIDTHS[0] + width - used)
        if "epoch" in shown:
            yield Text(f"{shown['epoch']} ", style="progress.description", end="")
        if bar:
            yield ProgressBar(total=max(1, total), completed=task.completed, width=bar)
            yield Text(" ", end="")
        yield Text(shown["counter"][:width], style="progress.download", end="")
        if "remaining" in shown:
            yield Text(f" {remaining}", style="progress.remaining", end="")
        yield Text("".join(f"{_GAP}{detail}" for detail in self._details if detail in shown), no_wrap=True)
