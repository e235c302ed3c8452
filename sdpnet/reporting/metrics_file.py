"""`metrics.jsonl`: lines of JSON that are appended while a run trains, also when the disk is full for a while.

A step has one line of training and one line of evaluation at most. A run that was killed may have written lines that
its newest checkpoint knows nothing of; it writes them again when it continues, and the first ones go.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish_bytes, write_all
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file

__all__ = ["LAST_STEP", "MetricsFile", "is_evaluation", "metrics_line", "metrics_lines"]

LAST_STEP: Final = 2**53  # float64, as which steps are drawn, counts no further
_LONGEST_LINE: Final = 1 << 20  # characters
_LARGEST_FILE: Final = 1 << 31  # bytes


def metrics_line(text: str) -> dict[str, Any] | None:
    """The object of a line, or None where it is no JSON object with a step from 0 to `LAST_STEP`."""
    try:
        line = json.loads(text)
        step = float(line["step"])
        return line if isinstance(line, dict) and 0 <= step <= LAST_STEP else None  # NaN compares as false
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line has the scores of an evaluation; else it is one of training."""
    return "top1" in line or "ema_top1" in line


def metrics_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The lines of a file as text, each with what `metrics_line` makes of it.

    However large the file and its lines are, a few megabytes of memory are taken. A line over a million characters
    comes in parts. Raises `UserError` for what is no file or far too large to be a run's metrics.
    """
    try:
        descriptor = open_regular_file(path)
    except NotRegularError:
        raise UserError(f"{path}: is not a file; move it away") from None
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        size = os.fstat(descriptor).st_size
        if size > _LARGEST_FILE:
            raise UserError(f"{path}: {size:,} bytes are too many for a run's metrics; move it away")
        while text := file.readline(_LONGEST_LINE):
            yield text, metrics_line(text)


class MetricsFile:
    """Appends one JSON object per line.

    A line that the system refuses to write is kept, and written before the next one: no line is lost while the run
    lasts, and none is cut short. `say` gets a line when that begins, when it ends, and when lines are lost at the end.
    `require_own` raises `OSError` where the file would be written into another run's directory.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None], require_own: Callable[[], object] = lambda: None
    ) -> None:
        self._path, self._say, self._require_own = path, say, require_own
        self._pending: list[bytes] = []
        self._is_refused = False

    def keep_up_to(self, step: int, *, evaluated: bool = True) -> None:
        """Removes the lines that a run which continues after `step` will write again: those of later steps, that of the
        step's evaluation where the checkpoint does not know of it (`evaluated` is False), and lines that a crash cut
        short. Where a step has two lines of one kind, the last stays."""
        if not os.path.lexists(self._path):
            return
        kept: dict[tuple[float, bool], bytes] = {}
        for text, line in metrics_lines(self._path):
            if line is None:
                continue
            at, scores = float(line["step"]), is_evaluation(line)
            if at < step or (at == step and (evaluated or not scores)):
                kept.pop((at, scores), None)
                kept[at, scores] = f"{text.rstrip()}\n".encode("utf-8", "replace")
        publish_bytes(self._path, b"".join(kept.values()))

    def append(self, metrics: Mapping[str, Any]) -> None:
        self._pending.append(f"{json.dumps(metrics)}\n".encode())
        self._write()

    def close(self) -> None:
        """Tries once more to write what is still kept."""
        if self._pending:
            self._write()
        if self._pending:
            self._say(f"{self._path}: its last {len(self._pending)} lines could not be written and are lost")
            self._pending.clear()

    def _write(self) -> None:
        try:
            self._require_own()
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            try:
                end = os.fstat(descriptor).st_size
                try:
                    write_all(descriptor, b"".join(self._pending), end)
                except OSError:
                    os.ftruncate(descriptor, end)
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._is_refused:
                self._say(f"{self._path}: cannot be written ({error.strerror}); its lines are kept until it can")
            self._is_refused = True
            return
        self._pending.clear()
        if self._is_refused:
            self._say(f"{self._path}: is written again, no line is lost")
        self._is_refused = False
