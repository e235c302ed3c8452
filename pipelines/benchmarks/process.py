"""Runs a contestant of the benchmark in a process of its own, pinned to cores, which works only on request."""

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

ANSWER_TIMEOUT = 600  # seconds


class ContestantError(Exception):
    """The contestant cannot be measured. The message is one line."""


class BenchProcess:
    """A contestant's process, as a context manager. At the end, the process and its workers are killed."""

    def __init__(self, job: Job) -> None:
        self._connection, child_end = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # In a session of its own, the process does not get Ctrl-C, which this process handles, and it can be killed
        # together with its workers.
        self._process = subprocess.Popen(
            [sys.executable, bench_worker.__file__, str(child_end.fileno())],
            pass_fds=[child_end.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )
        child_end.close()
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
        """Imports the libraries, makes the loader and takes one batch. It must be called first, and once."""
        return self._ask("start")

    def calibrate(self, seconds: float) -> int:
        """The number of batches for a round of about `seconds` seconds."""
        return self._ask("calibrate", seconds)

    def round(self, num_batches: int) -> Round:
        """Times `num_batches` batches."""
        return self._ask("round", num_batches)

    def _ask(self, *request: object) -> Any:
        """Sends a request and returns the answer.

        Raises `ContestantError` if the contestant fails, if its process has ended, or if it does not answer in time.
        """
        try:
            self._connection.send(request)
            if not self._connection.poll(ANSWER_TIMEOUT):
                raise ContestantError(f"no answer within {ANSWER_TIMEOUT} s")
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
