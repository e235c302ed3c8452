"""The running processes, from Linux's /proc."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["children_of", "running"]


def _stat(process: int | str) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on, or None if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def running(process: int | str) -> bool:
    """Whether a process exists and has not ended."""
    fields = _stat(process)
    return fields is not None and fields[0] != "Z"


def children_of(process: int) -> set[int]:
    """The children of a process that have not ended."""
    stats = {int(name): _stat(name) for name in os.listdir("/proc") if name.isdigit()}
    return {pid for pid, fields in stats.items() if fields and int(fields[1]) == process and fields[0] != "Z"}
