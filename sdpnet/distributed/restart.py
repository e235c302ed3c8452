"""torchrun's restarts: a group that `--max-restarts` starts again goes on with the run that it began, by itself.

A run that someone else began needs `--resume`, after a restart too: torchrun also repeats a start that was refused.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.files.small import read_small

__all__ = ["LAUNCH_NAME", "begun_by_this_launch", "note_launch"]

LAUNCH_NAME: Final = ".torchrun"


def note_launch(out: Path) -> None:
    """Notes in the run's directory which torchrun runs it, if one does; in the main process."""
    if (launch := _launch()) is None:
        (out / LAUNCH_NAME).unlink(missing_ok=True)
    else:
        publish_bytes(out / LAUNCH_NAME, f"{launch}\n".encode())


def begun_by_this_launch(out: Path) -> bool:
    """Whether torchrun has restarted this main process and the run in `out` is its own."""
    noted = out / LAUNCH_NAME
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return restarted and noted.is_file() and _text(noted) == _launch()


def _text(path: Path) -> str | None:
    try:
        return read_small(path).decode("utf-8").strip()
    except ValueError:
        return None


def _launch() -> str | None:
    """torchrun's id for the job; where it was given none ("none"), its process, which outlives restarts."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()} {os.getppid()}" if job == "none" else job
