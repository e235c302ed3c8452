"""Trainings whose disk refuses, whose folder goes, of which one rank is stopped, or whose ranks are not alike."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from forked_command import Child, Ended
from small_run import load_all, training
from training_kills import Prepared, arguments, differences, prepare_one, prepare_two
from trial import Kind, Outcome

__all__ = ["KINDS"]

SECONDS = 120.0
REFUSALS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT", "ESTALE")
CALLS = ("*", "open", "pwrite", "fsync", "replace", "io.open", "mkdir", "unlink")
FILES = ("", r"\.pt", "best", r"metrics\.jsonl", r"config\.yaml", r"per_class\.csv", r"model\.", "checkpoints$")
HARMS = ("removed", "renamed", "replaced", "emptied", "a file")
UNLIKE = ("optim.lr=0.002", "seed=5", "data.batch_size_per_gpu=4", "model.dim=32", "train.epochs=4", "code", "shards")


def _main(command: list[str], before: Callable[[], object] = lambda: None) -> int:
    """In the child."""
    import sdpnet.train

    before()
    return sdpnet.train.main(command)


def _inject(out: str, call: str, path: str, nth: int, action: str, lasting: bool) -> None:
    from faults import Fault, Injector

    Injector(out, Fault(call, path, nth, action, lasting)).install()


def _at_step(step: int, act: Callable[[], object]) -> None:
    """Does something after so many steps."""
    from sdpnet.reporting.reporter import Reporter

    advance, count = Reporter.advance, [0]

    def counting(self: Any) -> None:
        advance(self)
        count[0] += 1
        if count[0] == step:
            act()

    Reporter.advance = counting  # type: ignore[method-assign]


def _harm(out: Path, how: str) -> None:
    if how in ("removed", "a file"):
        shutil.rmtree(out)
    elif how == "emptied":
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    else:
        out.rename(out.with_name("moved"))
    if how == "a file":
        out.write_text("not a folder")
    elif how == "replaced":
        (out / "checkpoints").mkdir(parents=True)
        for name in (".lock", "metrics.jsonl", "config.yaml", "checkpoints/step_00000001.pt"):
            (out / name).write_text("of another run")


def _end(child: Child, said: str, allowed: tuple[int, ...] = ()) -> tuple[Ended, Outcome | None]:
    """How it ended, and the outcome where that is a bad one."""
    ended = child.wait(SECONDS)
    if ended.hung:
        return ended, Outcome("hung", f"{said}: over {SECONDS:g} s: {ended.last_words}")
    if not ended.ended_well and ended.status not in allowed:
        return ended, Outcome("crashed", f"{said}: status {ended.status}: {ended.last_words}")
    return ended, None


def _the_disk_refuses(prepared: Prepared, rng: np.random.Generator, scratch: Path) -> Outcome:
    out, asynchronous = scratch / "run", bool(rng.integers(2))
    call, path, action = (str(rng.choice(names)) for names in (CALLS, FILES, REFUSALS))
    nth, lasting = 1 + int(rng.integers(12 if path else 300)), bool(rng.integers(2))
    said = f"{action} at {call} {nth} of {path or 'any file'}{', lasting' if lasting else ''}, async {asynchronous}"
    command = arguments(prepared.data, out, 1, asynchronous)
    before = partial(_inject, str(out), call, path, nth, action, lasting)
    ended, bad = _end(Child(partial(_main, command, before), scratch / "first"), said)
    if bad is not None:
        return bad
    again, bad = _end(Child(partial(_main, [*command, "--resume"]), scratch / "again"), f"{said}: resumed")
    if bad is not None or again.status != 0:
        return bad or Outcome("lost", f"{said}: resumed: {again.last_words}")
    found = differences(prepared.whole[1], out)
    told = (r"metrics.jsonl", "are lost"), ("per_class.csv", "per_class.csv: cannot be written")
    found = [line for line in found if not any(line.startswith(name) and text in ended.out for name, text in told)]
    if found:
        return Outcome("wrong", f"{said}: ended with {ended.status}: {'; '.join(found[:5])}")
    return Outcome("ok", group="finished" if ended.status == 0 else "refused in one line")


def _the_folder_goes(prepared: Prepared, rng: np.random.Generator, scratch: Path) -> Outcome:
    how, step, asynchronous = str(rng.choice(HARMS)), 1 + int(rng.integers(18)), bool(rng.integers(2))
    out = scratch / "run"
    said = f"the folder is {how} after step {step}, async {asynchronous}"
    command = arguments(prepared.data, out, 1, asynchronous)
    before = partial(_at_step, step, partial(_harm, out, how))
    ended, bad = _end(Child(partial(_main, command, before), scratch / "first"), said)
    if bad is not None:
        return bad
    if how == "replaced":
        found = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
        names = (".lock", "metrics.jsonl", "config.yaml", "checkpoints/step_00000001.pt")
        if found != dict.fromkeys(names, "of another run"):
            return Outcome("wrong", f"{said}: it wrote into the folder that took its place: {sorted(found)}")
    if how in ("renamed", "replaced"):
        moved = scratch / "moved"
        again, bad = _end(
            Child(partial(_main, [*arguments(prepared.data, moved, 1, asynchronous), "--resume"]), scratch / "again"),
            said,
        )
        if bad is not None or again.status != 0:
            return bad or Outcome("lost", f"{said}: resumed where it is now: {again.last_words}")
        if found_here := differences(prepared.whole[1], moved):
            return Outcome("wrong", f"{said}: resumed where it is now: {'; '.join(found_here[:5])}")
    return Outcome("ok", group=f"{how}: {'finished' if ended.status == 0 else 'one line'}")


def _pair(bodies: list[Callable[[], int]], scratch: Path) -> list[Child]:
    from launches import free_port, member

    port = free_port()
    return [Child(body, scratch / f"rank{rank}", member(rank, 2, port)) for rank, body in enumerate(bodies)]


def _one_is_stopped(prepared: Prepared, rng: np.random.Generator, scratch: Path) -> Outcome:
    """For less time than the others wait, or for more."""
    out, rank, long = scratch / "run", int(rng.integers(2)), bool(rng.integers(2))
    step = 1 + int(rng.integers(17))
    said = f"rank {rank} is stopped after step {step}, {'for good' if long else 'for a second'}"
    wait = 6 if long else 60
    command = [*arguments(prepared.data, out, 2, bool(rng.integers(2))), "--set", f"train.timeout_seconds={wait}"]
    stop = partial(_at_step, step, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    children = _pair([partial(_main, command, *([stop] if number == rank else [])) for number in range(2)], scratch)
    until = time.monotonic() + SECONDS
    while not _is_stopped(children[rank].pid) and time.monotonic() < until:
        time.sleep(0.01)
    other = children[1 - rank]
    if not long:
        time.sleep(1)
        os.kill(children[rank].pid, signal.SIGCONT)
    ended, bad = _end(other, said)
    os.kill(children[rank].pid, signal.SIGCONT)
    woken, bad_too = _end(children[rank], f"{said}: when it goes on")
    if bad is not None or bad_too is not None:
        return bad or bad_too or Outcome("ok")
    if long and (ended.status != 2 or "no answer from another process for 6 s" not in ended.err):
        return Outcome("wrong", f"{said}: the other one ended with {ended.status}: {ended.last_words}")
    if not long and (ended.status or woken.status):
        return Outcome("wrong", f"{said}: ended with {ended.status} and {woken.status}: {ended.last_words}")
    if long:
        again = _pair([partial(_main, [*command, "--resume"])] * 2, scratch / "again")
        for number, child in enumerate(again):
            last, bad = _end(child, f"{said}: resumed: rank {number}")
            if bad is not None or last.status:
                return bad or Outcome("lost", f"{said}: resumed: {last.last_words}")
    found = differences(prepared.whole[2], out)
    return Outcome("wrong", f"{said}: {'; '.join(found[:5])}") if found else Outcome("ok", group=said[-12:])


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _not_alike(prepared: Prepared, rng: np.random.Generator, scratch: Path) -> Outcome:
    what, out = str(rng.choice(UNLIKE)), scratch / "run"
    command = arguments(prepared.data, out, 2, True)
    other, before = [*command, "--set", what], lambda: None
    if what == "code":
        other, before = command, _other_code
    elif what == "shards":
        shards = scratch / "shards"
        shutil.copytree(prepared.data, shards)
        _other_images(shards)
        other = [*training(shards, out), *command[command.index("--set") :]]
    bodies = [partial(_main, command), partial(_main, other, before)]
    rank = int(rng.integers(2))
    children = _pair(bodies if rank else bodies[::-1], scratch)
    for number, child in enumerate(children):
        ended, bad = _end(child, f"rank {rank} has another {what}: rank {number}")
        if bad is not None:
            return bad
        if ended.status != 2 or ("config, code" not in ended.err):
            return Outcome(
                "wrong", f"rank {rank} has another {what}: rank {number}: {ended.status}: {ended.last_words}"
            )
    return Outcome("ok", group=what) if not out.exists() else Outcome("wrong", f"another {what}: a run was begun")


def _other_code() -> None:
    from sdpnet.training import same_start

    same_start._code_sha256 = lambda: "f" * 64  # type: ignore[assignment]


def _other_images(shards: Path) -> None:
    from dataclasses import replace

    from sdpnet.pipelines.shards.manifest import read_manifest

    manifest = read_manifest(shards)
    split = manifest.splits["train"]
    files = tuple(replace(file, sha256="0" * 64) for file in split.files)
    splits = {**manifest.splits, "train": replace(split, files=files)}
    (shards / "manifest.json").write_text(replace(manifest, splits=splits).to_json())


_Trial = Callable[[Prepared, np.random.Generator, Path], Outcome]


def _run(trial: _Trial, prepared: Prepared, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    load_all(prepared.modules)
    for seed in seeds:
        folder = scratch / str(seed)
        yield trial(prepared, np.random.default_rng(seed), folder)
        shutil.rmtree(folder, ignore_errors=True)


KINDS: list[Kind] = [
    Kind("training, the disk refuses", 40, prepare_one, partial(_run, _the_disk_refuses), batch=20),
    Kind("training, its folder goes", 20, prepare_one, partial(_run, _the_folder_goes), batch=20),
    Kind("training, 2 ranks, one stopped", 8, prepare_two, partial(_run, _one_is_stopped), batch=8),
    Kind("training, 2 ranks, not alike", 14, prepare_two, partial(_run, _not_alike), batch=14),
]
