"""A process that converts hostile files, one after the other. If one of them ends it, the next gets a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from trial import Outcome

__all__ = ["ConvertingChild"]


class ConvertingChild:
    """A context manager.

    Args:
        code: a program that reads paths, one in each line of its input, and answers each with a line of JSON.
        scratch: an empty folder.
    """

    def __init__(self, code: str, scratch: Path) -> None:
        self._code, self._errors = code, scratch / "stderr"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ConvertingChild:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def convert(self, path: Path, kind: str) -> dict[str, Any] | Outcome:
        """Lets the process convert a file, and removes the file.

        Returns:
            The answer, or the outcome of a trial that has ended the process. Its text begins with `kind`.
        """
        process = self._process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        path.unlink()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status, self._process = process.wait(), None
        said = self._errors.read_text().strip().rpartition("\n")[2][:300]
        return Outcome("hung" if status == -27 else "crashed", f"{kind}: status {status}: {said}")  # SIGPROF

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", self._code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors.open("w"),
            text=True,
        )
