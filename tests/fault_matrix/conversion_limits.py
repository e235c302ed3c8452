"""Conversions without memory, disk or locks, on a machine that is busy, and with processes that are stopped."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from conversion_trials import (
    FORMATS,
    OFTEN,
    Run,
    Sets,
    finished,
    flags,
    make_source,
    prepare_calls,
    refusal,
    run,
    start,
    wait,
    whole_sets,
)
from faults import Commands, Fault
from processes import children_of
from trial import Kind, Outcome

from sdpnet.pipelines.shards.manifest import UNFINISHED_NAME

__all__ = ["KINDS"]

# File systems that have no locks. Each writer waits there until all of them have come.
NO_LOCKS = f"""
import errno, fcntl, glob, os, time
{OFTEN}
come = {{gate!r}} + ".%d" % os.getpid()
def refuse(*_):
    if not os.path.exists(come):
        open(come, "w").close()
        until = time.monotonic() + 20
        while len(glob.glob({{gate!r}} + ".*")) < {{count}} and time.monotonic() < until:
            pass
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = refuse
"""
# The disk with the source gives an error at some reads, and is well again when the command is repeated.
BAD_READS = f"""
import errno, os
{OFTEN}
from sdpnet.preprocess.conversion import command as build
build._workers = lambda arguments: 0
pread, calls = os.pread, [0]
def failing(*arguments):
    if os.readlink("/proc/self/fd/%d" % arguments[0]).startswith({{source!r}}):
        calls[0] += 1
        if calls[0] in {{when!r}}:
            raise OSError(errno.{{error}}, os.strerror(errno.{{error}}))
    return pread(*arguments)
os.pread = failing
"""
FULL = f"""
import resource, signal
{OFTEN}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({{size}}, {{size}}))
"""


def _prepare(folder: Path) -> Sets:
    source = make_source(folder / "source", 50, 20)
    return Sets(source, whole_sets(source, folder / "whole"), {})


def _refused_calls(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """A system call is refused, once or from then on, or writes take little; the command is then repeated."""
    with Commands(limit=60) as commands:
        for seed in seeds:
            rng = np.random.default_rng([8, seed])
            format, out = FORMATS[seed % 2], scratch / str(seed)
            action = str(rng.choice(["ENOSPC", "EIO", "EDQUOT", "EROFS", "short"]))
            nth = 1 + int(rng.integers(sets.calls[format] * 9 // 10))
            fault = Fault("pwrite" if action == "short" else "*", "", nth, action, bool(rng.integers(2)))
            with_workers = bool(rng.integers(2))
            arguments = flags(sets.source, out, "--workers", "1")
            first = commands.run(format, arguments, fault, with_workers)
            what = f"{format}, {action} at call {nth}{' and all later ones' if fault.lasting else ''}"
            ended = Run(first.status, first.stderr)
            if ended.status != 0 and (bad := refusal(ended, what)) is not None:
                yield bad
                continue
            last = commands.run(format, arguments)
            outcome = finished(Run(last.status, last.stderr), out, sets.whole[format], what)
            yield outcome or Outcome("ok", group=f"{action}: {'went on' if ended.status == 0 else 'one line'}")


def _full_disk(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """No file may grow beyond a size, as when a disk or quota is full; then there is room again."""
    for seed in seeds:
        rng = np.random.default_rng([9, seed])
        format, out = FORMATS[seed % 2], scratch / str(seed)
        largest = max(path.stat().st_size for path in sets.whole[format].iterdir())
        size = int(rng.integers(1, largest if rng.integers(2) else 5000))
        what = f"{format}, files of at most {size:,} bytes"
        if (bad := refusal(run(format, flags(sets.source, out), FULL.format(size=size)), what)) is not None:
            yield bad
            continue
        yield finished(run(format, flags(sets.source, out)), out, sets.whole[format], what) or Outcome("ok")


def _bad_reads(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """The source cannot be read in places: without --on-bad skip the command ends, and goes on when it is repeated."""
    for seed in seeds:
        rng = np.random.default_rng([10, seed])
        format, out = FORMATS[seed % 2], scratch / str(seed)
        error = str(rng.choice(["EIO", "ESTALE", "ENODEV", "ETIMEDOUT"]))
        when = sorted(set(rng.integers(1, 60, 1 + int(rng.integers(3))).tolist()))
        before = BAD_READS.format(source=str(sets.source), when=when, error=error)
        what = f"{format}, {error} at reads {when}"
        arguments = [word for word in flags(sets.source, out) if word not in ("--on-bad", "skip")]
        first = run(format, arguments, before)
        if (bad := refusal(first, what)) is not None:
            yield bad
            continue
        if os.strerror(getattr(errno, error)) not in first.error and "no image" not in first.error:
            yield Outcome("wrong", f"{what}: says {first.error}")
            continue
        yield finished(run(format, flags(sets.source, out)), out, sets.whole[format], what) or Outcome("ok")


def _writers(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """Writers at once, without locks of the system: one of them makes the set, the others end in a line."""
    for seed in seeds:
        rng = np.random.default_rng([11, seed])
        format, out = FORMATS[seed % 2], scratch / str(seed)
        count = 2 + int(rng.integers(5))
        arguments = flags(sets.source, out, "--workers", "1")
        if rng.integers(2):  # a run that was killed has left its lock
            process = start(format, arguments, before=NO_LOCKS.format(gate=str(scratch / f"one{seed}"), count=1))
            journal = out / UNFINISHED_NAME / "journal.jsonl"
            while not journal.exists() and process.poll() is None:
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        before = NO_LOCKS.format(gate=str(scratch / f"gate{seed}"), count=count)
        processes = [start(format, arguments, before=before) for _ in range(count)]
        runs = [wait(process) for process in processes]
        what = f"{format}, {count} writers: {[ended.status for ended in runs]}"
        losers = [ended for ended in runs if ended.status != 0]
        bad = next((bad for ended in losers if (bad := refusal(ended, what)) is not None), None)
        if bad is None and len(losers) != count - 1:
            bad = Outcome("wrong", f"{what}: {count - len(losers)} got in")
        yield bad or finished(run(format, arguments), out, sets.whole[format], what) or Outcome("ok")


def _memory(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """Little address space, or a worker that is killed as the system does without memory: an image is listed, or a
    line ends the command; repeated with memory it comes to the same."""
    for seed in seeds:
        rng = np.random.default_rng([12, seed])
        format, out = FORMATS[seed % 2], scratch / str(seed)
        arguments = flags(sets.source, out, "--workers", "2")
        if seed % 2:
            memory = int(rng.integers(165, 400)) * 1_000_000
            what = f"{format}, {memory // 1_000_000} MB of address space"
            ended = run(format, arguments, memory=memory)
        else:
            process = start(format, arguments)
            what = f"{format}, a worker is killed"
            deadline = time.monotonic() + 30
            while not (workers := sorted(children_of(process.pid))) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 1)))
            with suppress(ProcessLookupError, IndexError):
                os.kill(workers[int(rng.integers(len(workers)))], signal.SIGKILL)
            ended = wait(process)
        if ended.status != 0 and (bad := refusal(ended, what)) is not None:
            yield bad
            continue
        listed = out / "quarantine.jsonl"
        if ended.status == 0 and "memory" in (listed.read_text() if listed.exists() else ""):
            yield Outcome("ok", group="listed")
            continue
        outcome = finished(run(format, arguments), out, sets.whole[format], what)
        yield outcome or Outcome("ok", group="finished" if ended.status == 0 else "one line")


def _stopped(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """The command or its workers are stopped for longer than a decoder may take, on a busy machine: no image is bad."""
    for seed in seeds:
        rng = np.random.default_rng([13, seed])
        format, out = FORMATS[seed % 2], scratch / str(seed)
        load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(int(rng.integers(7)))]
        process = start(format, flags(sets.source, out, "--workers", "2", "--hang-seconds", "0.5"), niceness=15)
        stops = []
        try:
            for _ in range(1 + int(rng.integers(3))):
                time.sleep(float(rng.uniform(0, 1)))
                victims = [process.pid] if rng.integers(4) == 0 else sorted(children_of(process.pid))
                seconds = float(rng.uniform(0.6, 1.2))
                stops.append(f"{len(victims)} for {seconds:.1f} s")
                for signal_number in (signal.SIGSTOP, signal.SIGCONT):
                    for victim in victims:
                        with suppress(ProcessLookupError):
                            os.kill(victim, signal_number)
                    if signal_number == signal.SIGSTOP:
                        time.sleep(seconds)
            ended = wait(process)
        finally:
            for loop in load:
                loop.kill()
                loop.wait()
        what = f"{format}, {len(load)} other processes, stopped: {', '.join(stops)}"
        yield finished(ended, out, sets.whole[format], what) or Outcome("ok", group=f"{len(stops)} stops")


def _damaged(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """A run is killed, and a file of its unfinished work is cut, removed or replaced: the next one says so, or makes
    the same bytes; when that work is removed, it certainly does."""
    with Commands(limit=60) as commands:
        for seed in seeds:
            rng = np.random.default_rng([14, seed])
            format, out = FORMATS[seed % 2], scratch / str(seed)
            parts = ["--part", "1/1"] if rng.integers(3) == 0 else []
            arguments = flags(sets.source, out)
            commands.run(format, [*arguments, *parts], Fault("*", "", 30 + int(rng.integers(70)), "kill"))
            work = out / UNFINISHED_NAME
            files = sorted(path for path in work.rglob("*") if path.is_file())
            files += [work / f"{split}.crc32" for split in ("train", "val")] * (format == "beton" and not parts)
            path = files[int(rng.integers(len(files)))]
            damage = ("cut", "removed", "a pipe", "a folder", "a device", "a terabyte", "a loop")[int(rng.integers(7))]
            what = f"{format} {' '.join(parts)}: {path.name} is then {damage}"
            _damage(path, damage, rng)
            merging = [["--out", str(out), "--merge"]] if parts else []
            ended = Run(0, "")
            for line in ([*arguments, *parts], *merging):
                if ended.status == 0:
                    last = commands.run(format, line)
                    ended = Run(last.status, last.stderr)
            if ended.status != 0:
                if (bad := refusal(ended, what)) is not None:
                    yield bad
                    continue
                shutil.rmtree(work)
                last = commands.run(format, arguments)
                what = f"{what}; then all is removed"
                ended = Run(last.status, last.stderr)
            yield finished(ended, out, sets.whole[format], what) or Outcome("ok", group=damage)


def _damage(path: Path, damage: str, rng: np.random.Generator) -> None:
    if not path.exists():
        path.touch()
    if damage == "cut":
        os.truncate(path, int(rng.integers(path.stat().st_size + 1)))
        return
    if damage == "a terabyte":
        os.truncate(path, 1 << 40)
        return
    path.unlink(missing_ok=True)
    if damage == "a pipe":
        os.mkfifo(path)
    elif damage == "a folder":
        path.mkdir()
    elif damage == "a device":
        path.symlink_to("/dev/zero")
    elif damage == "a loop":
        path.symlink_to(path.name)


KINDS = [
    Kind("unfinished work damaged", 200, prepare_calls, _damaged, batch=20),
    Kind("conversion refused by the system", 160, prepare_calls, _refused_calls, batch=20),
    Kind("conversion on a full disk", 30, _prepare, _full_disk),
    Kind("source that cannot be read", 30, _prepare, _bad_reads),
    Kind("writers at once without locks", 24, _prepare, _writers, alone=True),
    Kind("conversion without memory", 30, _prepare, _memory),
    Kind("conversion stopped on a busy machine", 16, _prepare, _stopped, alone=True),
]
