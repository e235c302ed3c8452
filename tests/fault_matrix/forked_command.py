"""A command in a child that is forked from a process which has loaded torch: its output, time and memory are kept."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Child", "Ended"]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status; negative: the number of the signal.
        out, err: what it printed.
        peak: bytes of memory that it had at most beyond what the parent had when it was forked.
        seconds: of the processor's time.
        hung: it was killed because it took too long.
    """

    status: int
    out: str
    err: str
    peak: int
    seconds: float
    hung: bool

    @property
    def last_words(self) -> str:
        """The end of what it printed on stderr, on one line."""
        return " | ".join(self.err.strip().splitlines()[-3:])[-500:]

    @property
    def ended_well(self) -> bool:
        """Whether it finished, or was refused in one line that begins with "error: "."""
        lines = self.err.splitlines()
        refused = self.status == 2 and sum(line.startswith("error: ") for line in lines) == 1
        return not self.hung and "Traceback" not in self.err and (self.status == 0 or refused)


class Child:
    """A forked child that runs `body`, a command's `main`; the caller has one thread.

    Args:
        body: returns the exit status.
        scratch: a new folder for its output.
        variables: more of the environment.
        memory: how many bytes of address space it may take beyond what the parent has; 0: no limit.
    """

    def __init__(
        self, body: Callable[[], int], scratch: Path, variables: Mapping[str, str] | None = None, memory: int = 0
    ) -> None:
        scratch.mkdir(parents=True)
        self._files = scratch / "stdout", scratch / "stderr"
        sys.stdout.flush()
        sys.stderr.flush()
        self._before = _resident()
        self.pid = os.fork()
        if self.pid == 0:
            _run(body, self._files, variables or {}, memory)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        """Does not reap it."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, seconds: float) -> Ended:
        """Waits for its end, and kills it after so many seconds."""
        until, hung = time.monotonic() + seconds, False
        pause = 0.002
        while not self.has_ended():
            if time.monotonic() > until:
                hung = True
                self.kill()
            time.sleep(pause)
            pause = min(0.05, pause * 1.3)
        _, status, usage = os.wait4(self.pid, 0)
        out, err = (file.read_text(errors="replace") for file in self._files)
        peak = max(0, usage.ru_maxrss * 1024 - self._before)
        seconds = usage.ru_utime + usage.ru_stime
        return Ended(os.waitstatus_to_exitcode(status), out, err, peak, seconds, hung)


def _run(body: Callable[[], int], files: tuple[Path, Path], variables: Mapping[str, str], memory: int) -> None:
    """In the child; does not return."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        os.environ.update(variables)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory:
            limit = _pages(0) + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        status = body()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _resident() -> int:
    return _pages(1)


def _pages(column: int) -> int:
    """Bytes, from /proc/self/statm: column 0 is the address space, 1 what is in memory."""
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()
