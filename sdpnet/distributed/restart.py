"""Restarts by torchrun: with `--max-restarts`, restarted processes continue their own run without `--resume`.

A run that another launch of torchrun started needs `--resume` even after a restart. The reason is that torchrun also
restarts processes that have refused to start, for example because the directory holds another run already. A restart
alone therefore does not prove that the run is theirs, and the run's directory records which launch started it.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.files.small import read_small

__all__ = ["LAUNCH_NAME", "is_restart_of_own_run", "record_launch"]

LAUNCH_NAME: Final = ".torchrun"


def record_launch(out: Path) -> None:
    """Writes the id of the present torchrun launch, if there is one, to the run's directory; for the main process."""
    if (launch := _launch()) is None:
        (out / LAUNCH_NAME).unlink(missing_ok=True)
    else:
        publish_bytes(out / LAUNCH_NAME, f"{launch}\n".encode())


def is_restart_of_own_run(out: Path) -> bool:
    """Whether torchrun has restarted this main process, and the same launch started the run in `out`."""
    recorded = out / LAUNCH_NAME
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return restarted and recorded.is_file() and _text(recorded) == _launch()


def _text(path: Path) -> str | None:
    try:
        return read_small(path).decode("utf-8").strip()
    except ValueError:
        return None


def _launch() -> str | None:
    """The id of the job, if torchrun runs this process, else None.

    Without `--rdzv-id` torchrun's id is always "none". Host and process id of torchrun itself, which stays alive over
    restarts, take its place.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()} {os.getppid()}" if job == "none" else job
