"""The threads of the native decoder, as the system lists them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["assert_no_thread_is_left", "eventually", "our_threads"]


def our_threads() -> list[Path]:
    """Those of decoders in this process; one that has been joined stays visible for a moment."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just gone
            if (task / "comm").read_text() in ("crop-decoder\n", "read-ahead\n"):
                found.append(task)
    return found


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def assert_no_thread_is_left() -> None:
    assert eventually(lambda: not our_threads())
