"""Trainings that are killed inside the work, on one rank and on two, and go on to the same run.

What is the same: the weights, their average, the optimizer's state and all else in every checkpoint that is kept, the
best one, the model and its card, the CSV of the classes, the config, and each line of the metrics but for its times.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from small_run import in_process, load_all, loaded, make_shards, training
from trial import Kind, Outcome

__all__ = ["KINDS"]

TIMES = ("images_per_second", "data_wait_fraction", "step_ms", "gpu_memory_gb", "gpu_utilisation")
SECONDS = 120.0  # a launch that takes longer hangs; the processes' own timeout is ten minutes
SURVIVOR_SECONDS = 60.0  # how long the other rank may take to notice that one was killed
# Where a process is killed: module, attribute that is replaced, before or after the call. Those of MAIN are called in
# the main process alone.
EVERYWHERE = {
    "after a step": ("sdpnet.reporting.reporter:Reporter.advance", True),
    "before an evaluation": ("sdpnet.training.scoring:evaluate", False),
    "after an evaluation": ("sdpnet.training.scoring:evaluate", True),
}
MAIN = {
    "before per_class.csv": ("sdpnet.training.scoring:write_per_class", False),
    "after per_class.csv": ("sdpnet.training.scoring:write_per_class", True),
    "between an evaluation's line and its checkpoint": ("sdpnet.reporting.reporter:Reporter.evaluation", True),
    "before a checkpoint": ("sdpnet.checkpoints.directory:Checkpoints.save", False),
    "after a checkpoint was begun": ("sdpnet.checkpoints.directory:Checkpoints.save", True),
    "between a checkpoint and the best": ("sdpnet.checkpoints.directory:write_checkpoint", True),
    "between the best and what is removed": ("sdpnet.checkpoints.directory:Checkpoints._remove_old", False),
    "before the model": ("sdpnet.training.run_state:save_model", False),
    "after the model": ("sdpnet.training.run_state:save_model", True),
}


@dataclass(frozen=True)
class Prepared:
    """A shard set, and of each world size the run to which nothing happens and how often each point came in it."""

    data: Path
    whole: dict[int, Path]
    seconds: dict[int, float]
    counts: dict[int, dict[str, int]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


def arguments(data: Path, out: Path, world: int, asynchronous: bool) -> list[str]:
    """Three epochs of six steps with an evaluation each, saved after every second step."""
    written = f"train.async_checkpoints={str(asynchronous).lower()}"
    batch = f"data.batch_size_per_gpu={4 // world}"
    return training(data, out, batch, written, "train.epochs=3", "train.keep_checkpoints=2")


@dataclass(frozen=True)
class Kill:
    """When a process is killed: at the `nth` time that it comes to a point, or `after` seconds of training.

    `point` is a name of `EVERYWHERE` or `MAIN`, "system call" (the `nth` that changes the run's files, with an `action`
    of `faults.Fault`), "count" (none, but all are counted), or "" for a moment.
    """

    point: str = ""
    nth: int = 0
    action: str = "kill"
    after: float = 0.0

    def __str__(self) -> str:
        if not self.point:
            return f"after {self.after:.3f} s of training"
        return f"{self.action if self.point == 'system call' else 'kill'} at {self.point} {self.nth}"


class _Launch:
    """The processes of one training, forked from this one."""

    def __init__(self, command: list[str], world: int, scratch: Path, kills: dict[int, Kill] | None = None) -> None:
        from forked_command import Child
        from launches import free_port, member

        port, self.begun = free_port(), []
        self.children: list[Child] = []
        self.reports = [scratch / f"counts{rank}.json" for rank in range(world)]
        scratch.mkdir(parents=True)
        for rank in range(world):
            reading, writing = os.pipe()
            body = partial(_train, command, (kills or {}).get(rank), rank, writing, self.reports[rank])
            variables = {} if world == 1 else member(rank, world, port)
            self.children.append(Child(body, scratch / f"rank{rank}", variables))
            os.close(writing)
            self.begun.append(reading)

    def wait_for_training(self) -> None:
        """Until the main process has begun its first step, or has ended."""
        os.read(self.begun[0], 1)

    def wait(self, seconds: float) -> list[Any]:
        until = time.monotonic() + seconds
        ended = [child.wait(max(0.1, until - time.monotonic())) for child in self.children]
        for descriptor in self.begun:
            os.close(descriptor)
        return ended


def _train(command: list[str], kill: Kill | None, rank: int, begun: int, report: Path) -> int:
    """In the child: the command, which kills itself where it is told to."""
    import sdpnet.train
    from sdpnet.reporting.reporter import Reporter

    begin_epoch = Reporter.begin_epoch

    def beginning(self: Any, *of_epoch: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(begun, b".")
        begin_epoch(self, *of_epoch)

    Reporter.begin_epoch = beginning  # type: ignore[method-assign]
    if kill is None or not kill.point:
        return sdpnet.train.main(command)
    counts: dict[str, int] = {}
    if kill.point in ("system call", "count") and rank == 0:
        from faults import Fault, Injector

        fault = Fault("*", "", kill.nth, kill.action) if kill.point == "system call" else None
        injector = Injector(command[command.index("--out") + 1], fault)
        injector.install()
    for name in (*EVERYWHERE, *MAIN):
        _watch(name, kill, counts)
    try:
        return sdpnet.train.main(command)
    finally:
        if kill.point == "count":
            if rank == 0:
                counts["system call"] = sum(injector.counts.values())
            report.write_text(json.dumps({**counts, "modules": loaded()}))


def _watch(name: str, kill: Kill, counts: dict[str, int]) -> None:
    """Counts the calls at a point, and kills this process at the one that is meant."""
    import importlib

    where, after = {**EVERYWHERE, **MAIN}[name]
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, attribute)

    def calling(*positional: Any, **named: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        meant = kill.point == name and counts[name] == kill.nth
        if meant and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*positional, **named)
        if meant:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, calling)


@cache
def prepare(world: int) -> Prepared:
    """The same for all kinds of trials with so many ranks: it takes longer than some of them."""
    folder = Path(tempfile.mkdtemp(prefix="sdpnet-faults-training-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return in_process(_prepare_here, (world,), folder)


def prepare_one(folder: Path) -> Prepared:
    return prepare(1)


def prepare_two(folder: Path) -> Prepared:
    return prepare(2)


def _prepare_here(worlds: tuple[int, ...], folder: Path) -> Prepared:
    data = make_shards(folder)
    load_all()
    whole, seconds, counts, modules = {}, {}, {}, list[str]()
    for world in worlds:
        out = whole[world] = folder / f"whole{world}"
        began = time.monotonic()
        launch = _Launch(arguments(data, out, world, True), world, folder / f"first{world}")
        launch.wait_for_training()
        began = time.monotonic()
        require_good(launch.wait(SECONDS))
        seconds[world] = time.monotonic() - began
        counted = folder / f"counted{world}"
        counting = dict.fromkeys(range(world), Kill("count"))
        launch = _Launch(arguments(data, counted, world, False), world, folder / f"second{world}", counting)
        require_good(launch.wait(SECONDS))
        counts[world] = json.loads(launch.reports[0].read_text())
        modules = counts[world].pop("modules")
        found = differences(out, counted)
        assert not found, f"two runs to which nothing happens differ: {found}"
    return Prepared(data, whole, seconds, counts, tuple(modules))


def require_good(ended: Sequence[Any]) -> None:
    assert all(one.status == 0 and not one.hung for one in ended), [(one.status, one.err) for one in ended]


def differences(whole: Path, out: Path) -> list[str]:
    """What is not as in the run to which nothing happened, a line each."""
    from sdpnet.checkpoints.model import load_checkpoint

    names, expected = ({str(p.relative_to(run)) for p in run.rglob("*")} for run in (out, whole))
    found = [f"{name} is there" for name in sorted(names - expected)]
    found += [f"{name} is missing" for name in sorted(expected - names)]
    for name in sorted(names & expected):
        one, other = out / name, whole / name
        if one.is_dir():
            continue
        if name.endswith(".pt"):
            changed = _unlike(load_checkpoint(other), load_checkpoint(one), "")
            found += [f"{name}: {key}" for key in changed[:3]]
        elif name == "metrics.jsonl":
            before, after = _lines(other), _lines(one)
            if before != after:
                first = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), -1)
                found.append(f"{name}: {len(after)} lines, not {len(before)}; the first that differs is {first}")
        elif one.read_bytes() != other.read_bytes() and name != "config.yaml":
            found.append(f"{name}: other bytes")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _unlike(one: Any, other: Any, where: str) -> list[str]:
    """The keys at which two states differ, but for how checkpoints are written."""
    import torch

    if where in (".config.train.async_checkpoints", ".config.train.timeout_seconds"):
        return []
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [key for name in one for key in _unlike(one[name], other[name], f"{where}.{name}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [key for number, (a, b) in pairs for key in _unlike(a, b, f"{where}.{number}")]
    return [] if one == other else [where]


def _run(world: int, prepared: Prepared, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    load_all(prepared.modules)
    for seed in seeds:
        yield _trial(world, prepared, seed, scratch / str(seed))
        shutil.rmtree(scratch / str(seed), ignore_errors=True)


def _choose(world: int, prepared: Prepared, rng: np.random.Generator, share: float) -> tuple[int, Kill]:
    """A rank and when it is killed; `share` of the moments and points that a whole run has."""
    rank = int(rng.integers(world))
    if rng.random() < 0.3:
        return rank, Kill(after=float(rng.uniform(0, share * prepared.seconds[world])))
    counts = {name: count for name, count in prepared.counts[world].items() if rank == 0 or name in EVERYWHERE}
    name = str(rng.choice(sorted(counts)))
    nth = 1 + int(rng.integers(max(1, int(share * counts[name]))))
    return rank, Kill(name, nth, str(rng.choice(["kill", "kill after", "kill half"])))


def _trial(world: int, prepared: Prepared, seed: int, scratch: Path) -> Outcome:
    rng = np.random.default_rng((world, seed))
    asynchronous, together = bool(rng.integers(2)), bool(rng.integers(2))
    out, done = scratch / "run", []
    command = arguments(prepared.data, out, world, asynchronous)
    wanted, launches, share = 1 + int(rng.integers(3)), 0, 1.0
    told = f"world {world}, {'async' if asynchronous else 'sync'}"
    while len(done) < wanted and launches < 12:
        rank, kill = _choose(world, prepared, rng, share)
        launches += 1
        launch = _Launch(_again(command, launches), world, scratch / f"launch{launches}", {rank: kill})
        if not kill.point:
            launch.wait_for_training()
            time.sleep(kill.after)
            with contextlib.suppress(ProcessLookupError):
                launch.children[rank].kill()
        until = time.monotonic() + SECONDS
        while not launch.children[rank].has_ended() and time.monotonic() < until:
            time.sleep(0.002)
        if together:
            for child in launch.children:
                child.kill()
        ended = launch.wait(SURVIVOR_SECONDS)
        was_killed = ended[rank].status == -signal.SIGKILL and not ended[rank].hung
        if was_killed:
            done.append(f"rank {rank}: {kill}{', all with it' if together else ''}")
        elif done and all(one.status == 0 for one in ended):
            break  # it came to its end before the point
        said = f"{told}: {'; '.join(done)}"
        for number, one in enumerate(ended):
            if one.hung:
                return Outcome("hung", f"{said}: rank {number} took over {SURVIVOR_SECONDS:g} s: {one.last_words}")
            if not one.ended_well and one.status != -signal.SIGKILL:
                return Outcome("crashed", f"{said}: rank {number}: status {one.status}: {one.last_words}")
        if not was_killed:  # it ended before the point: begin anew, earlier
            share *= 0.5
            if not done:
                shutil.rmtree(out, ignore_errors=True)
    if not done:
        return Outcome("wrong", f"{told}: no kill came inside the work in {launches} launches")
    said = f"{told}: {'; '.join(done)}"
    ended = _Launch(_again(command, 2), world, scratch / "last").wait(SECONDS)
    for number, one in enumerate(ended):
        if one.hung or one.status != 0:
            verdict = "hung" if one.hung else "crashed"
            return Outcome(verdict, f"{said}: resumed: rank {number}: status {one.status}: {one.last_words}")
    if found := differences(prepared.whole[world], out):
        return Outcome("wrong", f"{said}: {'; '.join(found[:5])}")
    return Outcome("ok", group=f"{len(done)} kills, {'async' if asynchronous else 'sync'}")


def _again(command: list[str], launches: int) -> list[str]:
    return [*command, "--resume"] if launches > 1 else command


def _run_one(prepared: Prepared, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    return _run(1, prepared, seeds, scratch)


def _run_two(prepared: Prepared, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    return _run(2, prepared, seeds, scratch)


KINDS: list[Kind] = [
    Kind("training killed, 1 rank", 60, prepare_one, _run_one, batch=10),
    Kind("training killed, 2 ranks", 40, prepare_two, _run_two, batch=10),
]
