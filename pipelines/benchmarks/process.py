"""A contestant of the benchmark in a process of its own, pinned to cores, that works only when it is told to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from multiprocessing import Pipe
from types import TracebackType
from typing import Any

from sdpnet.pipelines.benchmarks import worker as bench_worker
from sdpnet.pipelines.benchmarks.worker import Job, Round, Started

__all__ = ["BenchProcess", "ContestantError"]

PATIENCE = 600  # seconds for one answer


class ContestantError(Exception):
    """The contestant cannot be measured; the message is one line."""


class BenchProcess:
    """A context manager: leaving it ends the process and its workers, whatever they are doing."""

    def __init__(self, job: Job) -> None:
        self._connection, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # A session of its own: Ctrl-C is this process's to handle, and the workers can be ended with it.
        self._process = subprocess.Popen(
            [sys.executable, bench_worker.__file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )
        theirs.close()
        self._connection.send(asdict(job))

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._errors.close()

    def start(self) -> Started:
        """Imports, makes the loader and takes one batch. Once, first."""
        return self._ask("start")

    def calibrate(self, seconds: float) -> int:
        """How many batches to time for a round of about that length."""
        return self._ask("calibrate", seconds)

    def round(self, num_batches: int) -> Round:
        """Times that many batches."""
        return self._ask("round", num_batches)

    def _ask(self, *request: object) -> Any:
        """Raises `ContestantError` for an error there, for a process that ended, and for one that does not answer."""
        try:
            self._connection.send(request)
            if not self._connection.poll(PATIENCE):
                raise ContestantError(f"no answer within {PATIENCE} s")
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise ContestantError(self._how_it_ended()) from None
        if isinstance(answer, str):
            raise ContestantError(answer)
        return answer

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last}" if last else how
