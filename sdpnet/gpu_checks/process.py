"""Runs a command with a time limit in a session of its own, and ends whatever it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sdpnet.gpu_checks.programs.commands import ROOT, environment

__all__ = ["run_limited"]

_GRACE: Final = 8  # seconds between the request to end and the kill


def run_limited(words: Sequence[str], log: Path, seconds: float, *, hide_gpus: bool = False) -> int | None:
    """Runs `python WORDS...` in the checkout, with its output in `log`.

    Returns:
        The exit status, or None if it was ended because it took longer.
    """
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**environment(), **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpus else {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    status = None
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _send(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    finally:
        _send(process.pid, signal.SIGKILL)
        process.wait()
    return status


def _send(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
