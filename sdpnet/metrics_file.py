"""`metrics.jsonl`: lines of JSON that are appended while a run trains, also when the disk is full for a while."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.publish import publish_bytes, write_all

__all__ = ["MetricsFile"]


class MetricsFile:
    """Appends one JSON object per line.

    A line that the system refuses to write is kept, and written before the next one: no line is lost while the run
    lasts, and none is cut short. `say` gets a line when that begins, when it ends, and when lines are lost at the end.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._pending: list[bytes] = []
        self._is_refused = False

    def keep_up_to(self, step: int) -> None:
        """Removes lines of later steps: a run that resumes from `step` will write them again."""
        if self._path.exists():
            lines = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            publish_bytes(self._path, "".join(f"{line}\n" for line in lines).encode())

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
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
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


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a crash cut short
