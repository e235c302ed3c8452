"""What trials of conversions share: a source, commands as people start them, and the verdict on how one ended."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from faults import CALLS, Commands, contents
from PIL import Image
from trial import Outcome

from sdpnet.preprocess.conversion.journal import read_journal
from sdpnet.preprocess.verify import verify

__all__ = [
    "ENTRY",
    "FORMATS",
    "Run",
    "Sets",
    "committed",
    "finished",
    "flags",
    "make_source",
    "prepare_calls",
    "refusal",
    "start",
    "wait",
    "whole_sets",
]

FORMATS = ("beton", "tar")
COMMANDS = {"beton": "build_ffcv", "tar": "build_dali"}
HANG_SECONDS = 90  # of a command that takes some: the machine may be busy with other trials
# Starts a build command after some lines of Python, which the trial puts before it.
ENTRY = "import sys; from sdpnet.preprocess import {command}; sys.exit({command}.main(sys.argv[1:]))"
# A line of the journal for every few images.
OFTEN = "from sdpnet.preprocess.conversion import committer; committer.COMMIT_SECONDS = 0.02"


@dataclass(frozen=True)
class Run:
    """How a command ended: exit status (negative: the signal), or None if it was ended because it took too long."""

    status: int | None
    stderr: str

    @property
    def error(self) -> str:
        """The one line that it ended with."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        return lines[0] if len(lines) == 1 and self.stderr.rstrip().endswith(lines[0]) else ""


def make_source(root: Path, train: int, val: int, *, sides: tuple[int, int] = (30, 400), bad: int = 2) -> Path:
    """Two classes with so many images of these sides in all, JPEG and PNG; the first `bad` of train are texts."""
    rng = np.random.default_rng(train)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            folder = root / split / ("ant", "bee")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
            width, height = rng.integers(*sides, 2).tolist()
            suffix = "png" if number % 5 == 4 else "jpg"
            path = folder / f"{number:04}.{suffix}"
            small.resize((width, height)).save(path)
            if split == "train" and number < bad:
                path.write_text(f"no image {number}")
    return root


def flags(source: Path, out: Path, *more: str) -> list[str]:
    return ["--source", str(source), "--out", str(out), "--on-bad", "skip", *more]


def start(
    format: str, arguments: list[str], *, before: str = OFTEN, memory: int = 0, niceness: int = 0
) -> subprocess.Popen[str]:
    """A build command in a process group of its own.

    Args:
        before: Python that runs first, in the same process.
        memory: bytes of address space that it and each of its workers may have; 0: any number.
        niceness: how much less of the processors it gets.
    """

    def limit() -> None:
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        os.nice(niceness)

    code = f"{before}\n{ENTRY.format(command=COMMANDS[format])}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=limit if memory or niceness else None,
    )


def wait(process: subprocess.Popen[str], seconds: float = HANG_SECONDS) -> Run:
    """How it ends; after so many seconds it is ended with its group."""
    try:
        _, stderr = process.communicate(timeout=seconds)
        return Run(process.returncode, stderr)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, stderr = process.communicate()
        return Run(None, stderr)


def run(format: str, arguments: list[str], before: str = OFTEN, memory: int = 0) -> Run:
    return wait(start(format, arguments, before=before, memory=memory))


def committed(work: Path) -> int:
    """How many lines the journal of a conversion, or of a part of one, has."""
    return len(read_journal(work / "journal.jsonl")[0])


def whole_sets(source: Path, folder: Path) -> dict[str, Path]:
    """The source converted without a fault: by format."""
    sets = {format: folder / format for format in FORMATS}
    for format, out in sets.items():
        ended = run(format, flags(source, out))
        assert ended.status == 0, ended.stderr
    return sets


@dataclass(frozen=True)
class Sets:
    """What is converted, what comes of it by format, and how many system calls that takes, by format."""

    source: Path
    whole: dict[str, Path]
    calls: dict[str, int]


def prepare_calls(folder: Path) -> Sets:
    """A small source, converted with every system call counted."""
    source = make_source(folder / "source", 14, 6, sides=(8, 20))
    whole, calls = {}, {}
    with Commands(limit=60) as commands:
        for format in FORMATS:
            whole[format] = folder / format
            ended = commands.run(format, flags(source, whole[format]))
            assert ended.status == 0, ended.stderr
            calls[format] = sum(number for call, number in ended.calls.items() if call in CALLS)
    return Sets(source, whole, calls)


def refusal(ended: Run, what: str) -> Outcome | None:
    """None where a command ended in one line that says what is wrong, with status 2; else what was wrong with that."""
    return _ending(ended, what) or (None if ended.status == 2 else Outcome("wrong", f"{what}: ended with status 0"))


def finished(ended: Run, out: Path, whole: Path, what: str) -> Outcome | None:
    """None where a command finished the set that `whole` is a copy of."""
    if (bad := _ending(ended, what)) is not None:
        return bad
    if ended.status != 0 and "already holds a shard set" not in ended.error:
        return Outcome("lost", f"{what}: the last run did not finish it: {ended.error}")
    found, expected = contents(out), contents(whole)
    if found != expected:
        names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return Outcome("wrong", f"{what}: other bytes in {', '.join(names)}")
    problems = [str(problem) for problem in verify(out)]
    return Outcome("wrong", f"{what}: verify says {problems[0]}") if problems else None


def _ending(ended: Run, what: str) -> Outcome | None:
    tail = ended.stderr.strip().rpartition("\n")[2][:300]
    if ended.status in (None, -signal.SIGALRM):
        return Outcome("hung", f"{what}: ran for more than {HANG_SECONDS} s; {tail}")
    if ended.status < 0:
        return Outcome("crashed", f"{what}: ended by {signal.Signals(-ended.status).name}; {tail}")
    if "Traceback" in ended.stderr:
        return Outcome("crashed", f"{what}: a traceback: {tail}")
    if ended.status not in (0, 2) or (ended.status == 2 and not ended.error):
        return Outcome("wrong", f"{what}: status {ended.status}, and not one line: {ended.stderr[-300:]!r}")
    return None


def kill_inside(process: subprocess.Popen[str], is_inside: Callable[[], bool], delay: float) -> bool:
    """Kills a command's process group `delay` seconds after `is_inside` became true; whether it was still at work."""
    deadline = time.monotonic() + HANG_SECONDS
    while not is_inside() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    was_running = process.poll() is None
    if was_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return was_running and process.returncode == -signal.SIGKILL


def copy(source: Path, to: Path) -> Path:
    shutil.copytree(source, to, symlinks=True)
    return to
