"""Starts the processes of one training as torchrun does, or by torchrun, so that a test can kill or stop them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["TORCHRUN", "Rank", "environment", "free_port", "member", "ranks", "wait_for_step"]

# The address is given because a machine may not be able to resolve its own name.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
ROOT = Path(__file__).parents[2]


class Rank:
    """One process, with its stdout and stderr in two files."""

    def __init__(self, command: Sequence[str], variables: dict[str, str], scratch: Path) -> None:
        self.files = scratch / "stdout", scratch / "stderr"
        scratch.mkdir(parents=True)
        with self.files[0].open("w") as out, self.files[1].open("w") as err:
            self.process = subprocess.Popen(command, env=variables, stdout=out, stderr=err, text=True)

    def ended(self, within: float) -> tuple[int, str, str]:
        """Waits for the end of the process. Returns exit status, stdout and stderr.

        The lines that gloo prints in torch 2.10 when processes connect are removed. Raises `subprocess.TimeoutExpired`
        after `within` seconds.
        """
        status = self.process.wait(within)
        out, err = (re.sub(r"^\[Gloo\] .*\n", "", file.read_text(), flags=re.MULTILINE) for file in self.files)
        return status, out, err


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def member(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment variables for a process of a group on this machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


@contextmanager
def ranks(
    arguments: Sequence[str], world_size: int, scratch: Path, program: Sequence[str] = ("-m", "sdpnet.train")
) -> Iterator[list[Rank]]:
    """Starts the processes of a program without torchrun, which would end all of them with the first one.

    Processes that still run on exit are killed.
    """
    port = free_port()
    command = [sys.executable, *program, *arguments]
    started = []
    try:
        for rank in range(world_size):
            variables = environment(**member(rank, world_size, port))
            started.append(Rank(command, variables, scratch / f"rank{rank}"))
        yield started
    finally:
        for process in (rank.process for rank in started):
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str], within: float = 120) -> None:
    """Returns when `metrics.jsonl` has a line for this step or a later one. `process` must still run until then."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        if any(json.loads(line)["step"] >= step for line in lines if line.endswith("\n")):
            return
        assert process.poll() is None, f"ended with status {process.returncode}"
        time.sleep(0.05)
    raise AssertionError(f"{out} did not come to step {step} within {within} s")
