"""`metrics.jsonl`: lines of JSON that are appended while a run trains. No line is lost if the disk is full for a while.

A step has at most one line of training metrics and one line of scores. A run that is killed may have written lines of
steps that its newest checkpoint does not include. It trains these steps again when it continues and writes the same
lines again, so the earlier ones are removed first.
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

LAST_STEP: Final = 2**53  # charts use float64, which cannot represent every larger integer
_LONGEST_LINE: Final = 1 << 20  # characters
_LARGEST_FILE: Final = 1 << 31  # bytes


def metrics_line(text: str) -> dict[str, Any] | None:
    """The JSON object in a line, or None if the line is not a JSON object with a step from 0 to `LAST_STEP`."""
    try:
        line = json.loads(text)
        step = float(line["step"])
        return line if isinstance(line, dict) and 0 <= step <= LAST_STEP else None  # False for NaN
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line has the scores of an evaluation. All other lines have metrics of training."""
    return "top1" in line or "ema_top1" in line


def metrics_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yields each line of a file as text, with the result of `metrics_line` for it.

    A line of over a million characters is yielded in parts, so that any file takes only a few megabytes of memory.

    Raises:
        UserError: `path` is not a regular file, or is far too large to be the metrics of a run.
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
    """Appends JSON objects to a file, one per line.

    A line that the system refuses to write is kept in memory and written before the next one. A full disk must not end
    a training, and no line is lost or incomplete once there is space again.

    Args:
        say: is called with one line of text when the system first refuses a line, when writing works again, and when
            lines are lost at the end of the run.
        require_own: raises `OSError` where the file would be written into another run's directory.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None], require_own: Callable[[], object] = lambda: None
    ) -> None:
        self._path, self._say, self._require_own = path, say, require_own
        self._pending: list[bytes] = []
        self._is_refused = False

    def keep_up_to(self, step: int, *, evaluated: bool = True) -> None:
        """Removes the lines that a run will write again when it continues after `step`.

        These are the lines of later steps and, if `evaluated` is False, the scores of `step` itself: its checkpoint was
        then saved before the evaluation, which is repeated. Incomplete lines are removed too. If a step has two lines
        of one kind, the last one stays.
        """
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
        """Tries once more to write the lines that are kept in memory."""
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
                # A write may fail after a part of it is in the file. That part is cut off again, so that the next try
                # does not append to an incomplete line.
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
                self._say(f"{self._path}: cannot be written ({error.strerror}); new lines wait in memory")
            self._is_refused = True
            return
        self._pending.clear()
        if self._is_refused:
            self._say(f"{self._path}: can be written again; no line is lost")
        self._is_refused = False
