"""The threads of the native decoder that the system lists."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["assert_no_thread_is_left", "eventually", "our_threads"]


def our_threads() -> list[Path]:
    """The threads of decoders in this process. A thread that was joined stays visible for a moment."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has just ended
            if (task / "comm").read_text() in ("crop-decoder\n", "read-ahead\n"):
                found.append(task)
    return found


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition becomes true within five seconds."""
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def assert_no_thread_is_left() -> None:
    assert eventually(lambda: not our_threads())
