"""Conversions that are killed inside the work, and go on to the same bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from conversion_trials import (
    FORMATS,
    Run,
    Sets,
    committed,
    finished,
    flags,
    kill_inside,
    make_source,
    prepare_calls,
    refusal,
    run,
    start,
    wait,
    whole_sets,
)
from faults import Commands, Fault, require_absent_or_complete
from trial import Kind, Outcome

from sdpnet.pipelines.shards.manifest import UNFINISHED_NAME

__all__ = ["KINDS"]


def _at_calls(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """One to four runs are each killed at a random system call; the last one is not."""
    with Commands(limit=60) as commands:
        for seed in seeds:
            rng = np.random.default_rng([1, seed])
            format, with_workers = FORMATS[seed % 2], bool(rng.integers(2))
            out = scratch / str(seed)
            kills: list[str] = []
            for number in range(1 + int(rng.integers(4))):
                nth = 1 + int(rng.integers(sets.calls[format] * 6 // 10 if number == 0 else sets.calls[format] // 3))
                fault = Fault("*", "", nth, str(rng.choice(["kill", "kill half", "kill after"])))
                ended = commands.run(format, flags(sets.source, out, "--workers", "1"), fault, with_workers)
                kills.append(f"{fault.action} at call {nth}: {ended.status}")
                if ended.status != -signal.SIGKILL:
                    break
            what = f"{format}, {'with' if with_workers else 'without'} a worker, {'; '.join(kills)}"
            if not kills[0].endswith(str(-signal.SIGKILL)):
                yield Outcome("wrong", f"the harness did not kill it: {what}")
                continue
            try:
                require_absent_or_complete(out, sets.whole[format])
            except AssertionError:
                yield Outcome("wrong", f"what is not whole has a final name: {what}")
                continue
            last = commands.run(format, flags(sets.source, out, "--workers", "1"))
            outcome = finished(Run(last.status, last.stderr), out, sets.whole[format], what)
            yield outcome or Outcome("ok", group=f"killed {len(kills)} times")


def _prepare_commands(folder: Path) -> Sets:
    source = make_source(folder / "source", 240, 40)
    return Sets(source, whole_sets(source, folder / "whole"), {})


def _at_moments(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """A command is killed with its process group at random moments after its first journal line, until two kills
    have certainly met it at work."""
    for seed in seeds:
        rng = np.random.default_rng([2, seed])
        format = FORMATS[seed % 2]
        arguments = flags(sets.source, scratch / str(seed), "--workers", str(1 + int(rng.integers(3))))
        out = scratch / str(seed)
        kills: list[str] = []
        lines = 1
        for _ in range(20):
            before = lines
            inside = kill_inside(
                start(format, arguments),
                lambda out=out, before=before: committed(out / UNFINISHED_NAME) > before,
                delay := float(rng.uniform(0, 0.15)),
            )
            inside = inside and not (out / "manifest.json").exists()
            kills.append(f"{delay:.3f} s after line {before}: {'inside' if inside else 'too late'}")
            if inside:
                lines = committed(out / UNFINISHED_NAME)
            if not inside or sum("inside" in kill for kill in kills) == 2:
                break
        what = f"{format}, {'; '.join(kills)}"
        if "inside" not in kills[0]:
            yield Outcome("wrong", f"the harness did not meet it at work: {what}")
            continue
        outcome = finished(run(format, arguments), out, sets.whole[format], what)
        yield outcome or Outcome("ok", group=f"met at work {sum('inside' in kill for kill in kills)} times")


def _prepare_parts(folder: Path) -> Sets:
    source = make_source(folder / "source", 90, 30)
    return Sets(source, whole_sets(source, folder / "whole"), {})


def _parts(sets: Sets, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """Parts run side by side; some are killed and started again while the others go on. A merge is tried before all
    are finished, then killed, and repeated."""
    for seed in seeds:
        yield _one_set_of_parts(sets, seed, scratch / str(seed))


def _one_set_of_parts(sets: Sets, seed: int, out: Path) -> Outcome:
    rng = np.random.default_rng([3, seed])
    format, count = FORMATS[seed % 2], 2 + int(rng.integers(3))
    arguments = [flags(sets.source, out, "--part", f"{i + 1}/{count}", "--workers", "1") for i in range(count)]
    works = [out / UNFINISHED_NAME / f"part-{i + 1}-of-{count}" for i in range(count)]
    victims = sorted(rng.choice(count, 1 + int(rng.integers(count)), replace=False).tolist())
    processes = [start(format, line) for line in arguments]
    what = f"{format}, {count} parts, of which {', '.join(str(i + 1) for i in victims)} are killed"
    inside = 0
    try:
        for victim in victims:
            delay = float(rng.uniform(0, 0.1))
            inside += kill_inside(processes[victim], lambda at=works[victim]: committed(at) > 1, delay)
            early = run(format, ["--out", str(out), "--merge"])  # while the others run
            if early.status == 0:  # all were finished but for their last breath
                return finished(early, out, sets.whole[format], f"{what}: merged early") or Outcome("ok", group="early")
            if (bad := refusal(early, f"{what}: a merge before all are finished")) is not None:
                return bad
            processes[victim] = start(format, arguments[victim])
        for process in processes:
            ended = wait(process)
            if ended.status != 0:
                return Outcome("lost", f"{what}: a part ended with {ended.status}: {ended.stderr[-300:]}")
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    merging = ["--out", str(out), "--merge"]
    before = committed(out / UNFINISHED_NAME)
    process = start(format, merging)
    delay = float(rng.uniform(0, 0.1))
    inside += kill_inside(process, lambda: committed(out / UNFINISHED_NAME) > before + 1, delay)
    what = f"{what}; {inside} kills inside"
    if not inside:
        return Outcome("wrong", f"the harness met none at work: {what}")
    again = run(format, arguments[0])  # it has nothing to do, or the merge has begun to give files their names
    if again.status != 0 and "repeat --merge" not in again.error and "already holds" not in again.error:
        return Outcome("wrong", f"{what}: a finished part that is run again: {again.stderr[-300:]}")
    return finished(run(format, merging), out, sets.whole[format], what) or Outcome("ok", group=f"{inside} inside")


KINDS = [
    Kind("conversion killed at system calls", 120, prepare_calls, _at_calls, batch=20),
    Kind("conversion killed at any moment", 30, _prepare_commands, _at_moments),
    Kind("parts and merge killed", 30, _prepare_parts, _parts),
]
