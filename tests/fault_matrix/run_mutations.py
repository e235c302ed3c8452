"""Mutated run directories: checkpoints, weights, model cards, metrics and settings, changed in a seeded way.

Each is read by commands that read a run, in forked children under limits. A command may refuse it in one line, or work;
what was changed byte by byte must not change a resumed run's weights, because a checkpoint notices that.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from forked_command import Child, Ended
from run_files import (
    Mutate,
    checkpoint_bytes,
    checkpoint_content,
    metrics,
    model_card,
    other_files,
    settings,
    special_files,
    weights,
)
from small_run import in_process, load_all, loaded, make_shards, training
from trial import Kind, Outcome

__all__ = ["KINDS"]

SECONDS = 10.0  # of the processor's time, beyond what the command takes with the run as it was
MEMORY = 500_000_000  # bytes, beyond what the command takes with the run as it was
HANGS = 90.0  # seconds after which a command is killed, on a busy machine too
ADDRESSES = 4_000_000_000  # bytes of address space, beyond what a command's parent has
STEPS = 12  # after so many a training is told to stop: a changed config may ask for millions
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # on a terminal
FINISHED, BEGUN = "finished", "begun"


@dataclass(frozen=True)
class Prepared:
    """A shard set, an image of it, a run that is finished and one that was stopped in its last epoch.

    Attributes:
        cost: by command, of the unchanged runs: seconds of the processor's time, bytes of memory.
        weights: the bytes of `model.safetensors` with which the begun run ends.
        modules: what the commands import.
    """

    data: Path
    image: Path
    runs: dict[str, Path]
    cost: dict[str, tuple[float, int]]
    weights: bytes
    modules: tuple[str, ...] = ()


def _commands(prepared: Prepared, run: Path, out: Path) -> dict[str, Callable[[], int]]:
    """What reads a run. The bodies of children."""
    data, model = str(prepared.data), str(run)
    evaluate = ["evaluate", "--model", model, "--data", data, "--batch-size", "4"]
    command = training(prepared.data, out / "new", "train.epochs=1")
    return {
        "resume": partial(_train, ["--resume", "--out", str(run)]),
        "start_from": partial(_train, [*command, "--set", f"train.start_from={run}"]),
        "evaluate": partial(_sdpnet, [*evaluate, "--per-class", str(out / "classes.csv")]),
        "evaluate raw": partial(_sdpnet, [*evaluate, "--weights", "raw", "--json"]),
        "predict": partial(_sdpnet, ["predict", "--model", model, str(prepared.image)]),
        "export": partial(
            _sdpnet, ["export", "--model", model, "--format", "torch-export", "--out", str(out / "model.pt2")]
        ),
        "report": partial(_sdpnet, ["report", model, "--out", str(out / "report.html")]),
        "sheet": partial(
            _sdpnet,
            [
                "sheet",
                "--config",
                f"{run}/config.yaml",
                "--data",
                data,
                "--count",
                "1",
                "--out",
                str(out / "sheet.png"),
            ],
        ),
        "doctor": partial(_sdpnet, ["doctor", "--config", f"{run}/config.yaml", "--json"]),
    }


READERS = ("evaluate", "evaluate raw", "predict", "export", "start_from")


def _sdpnet(arguments: list[str]) -> int:
    from sdpnet import cli

    return cli.main(arguments)


def _train(arguments: list[str]) -> int:
    """A training that is told to stop after some steps."""
    import sdpnet.train

    step, count = sdpnet.train.take_step, [0]

    def counting(*of_step: Any) -> Any:
        count[0] += 1
        if count[0] == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*of_step)

    sdpnet.train.take_step = counting
    return sdpnet.train.main(arguments)


def _prepare(folder: Path) -> Prepared:
    return _prepare_once()


@cache
def _prepare_once() -> Prepared:
    """The same for all kinds: it takes longer than many trials."""
    folder = Path(tempfile.mkdtemp(prefix="sdpnet-faults-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return in_process(_prepare_here, folder)


def _prepare_here(folder: Path) -> Prepared:
    data = make_shards(folder)
    load_all()
    image = folder / "images" / "val" / "ant" / "0.png"
    runs = {name: folder / name for name in (FINISHED, BEGUN)}
    require(Child(partial(_train, training(data, runs[FINISHED])), folder / "log1").wait(HANGS))

    def stopped() -> int:
        from sdpnet.reporting.reporter import Reporter

        advance, count = Reporter.advance, [0]

        def counting(self: Reporter) -> None:
            advance(self)
            count[0] += 1
            if count[0] == 9:
                os.kill(os.getpid(), signal.SIGTERM)

        Reporter.advance = counting  # type: ignore[method-assign]
        return _train(training(data, runs[BEGUN], "train.epochs=2"))

    require(Child(stopped, folder / "log2").wait(HANGS), 143)
    prepared = Prepared(data, image, runs, {}, b"")
    cost: dict[str, tuple[float, int]] = {}
    for name in _commands(prepared, runs[FINISHED], folder):
        run, out = folder / f"run {name}", folder / f"out {name}"
        out.mkdir()
        shutil.copytree(runs[BEGUN if name == "resume" else FINISHED], run)
        body = partial(_noting_modules, _commands(prepared, run, out)[name], folder / "modules")
        ended = Child(body, folder / f"log {name}").wait(HANGS)
        require(ended)
        cost[name] = ended.seconds, ended.peak
    weights = (folder / "run resume" / "model.safetensors").read_bytes()
    return Prepared(data, image, runs, cost, weights, tuple((folder / "modules").read_text().split()))


def _noting_modules(body: Callable[[], int], path: Path) -> int:
    try:
        return body()
    finally:
        with path.open("a") as file:
            file.write("".join(f"{name}\n" for name in loaded()))


def require(ended: Ended, status: int = 0) -> None:
    assert ended.status == status and not ended.hung, (ended.status, ended.err)


def _run(
    base: str,
    mutate: Mutate,
    names: tuple[str, ...],
    exact: bool,
    prepared: Prepared,
    seeds: Sequence[int],
    scratch: Path,
) -> Iterator[Outcome]:
    load_all(dict.fromkeys(prepared.modules))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        run, out = scratch / "run", scratch / "out"
        shutil.copytree(prepared.runs[base], run)
        out.mkdir()
        what = mutate(run, rng)
        chosen = [name for name in names if name == "resume"]
        rare = rng.random() < 0.9  # it imports every backend, which takes long
        others = [name for name in names if name != "resume" and not (rare and name == "doctor")]
        chosen += rng.choice(others, min(len(others), 2), replace=False).tolist()
        rng.shuffle(chosen)
        outcome = Outcome("ok")
        for name in chosen:
            ended = Child(_commands(prepared, run, out)[name], scratch / name, _variables(), ADDRESSES).wait(HANGS)
            outcome = _judged(name, ended, prepared, f"{what}: {name}")
            if outcome.verdict == "ok" and exact and name == "resume":
                outcome = _exact(ended, run, prepared, what)
            if outcome.verdict != "ok":
                break
        yield outcome
        for path in scratch.iterdir():
            shutil.rmtree(path, ignore_errors=True)


def _variables() -> dict[str, str]:
    return {"TORCHDYNAMO_DISABLE": "1", "WANDB_MODE": "offline", "COLUMNS": "100"}


def _judged(name: str, ended: Ended, prepared: Prepared, said: str) -> Outcome:
    seconds, memory = prepared.cost[name]
    text = f"{said}: status {ended.status}: {ended.last_words}"
    if ended.hung or ended.seconds > seconds + SECONDS:
        return Outcome("hung", f"{said}: {ended.seconds:.0f} s of the processor's time: {ended.last_words}")
    if not ended.ended_well and ended.status != 128 + signal.SIGTERM:
        return Outcome("crashed", text)
    if "Traceback" in ended.err or ended.peak > memory + MEMORY:
        return Outcome("crashed", f"{said}: {(ended.peak - memory) / 1e6:.0f} MB more than with the run as it was")
    if ACTS.search(ended.out + ended.err):
        return Outcome("wrong", f"{said}: what it prints acts on a terminal")
    return Outcome("ok", group="refused" if ended.status == 2 else "done")


def _exact(ended: Ended, run: Path, prepared: Prepared, what: str) -> Outcome:
    """A damaged newest checkpoint costs the steps since the one before it, and nothing else."""
    if ended.status != 0:
        return Outcome("lost", f"{what}: the one before it was not taken: {ended.last_words}")
    if (run / "model.safetensors").read_bytes() != prepared.weights:
        return Outcome("wrong", f"{what}: other weights")
    return Outcome("ok", group="same weights")


def _kind(name: str, trials: int, base: str, mutate: Mutate, names: tuple[str, ...], exact: bool = False) -> Kind:
    return Kind(f"run: {name}", trials, _prepare, partial(_run, base, mutate, names, exact), batch=25)


KINDS: list[Kind] = [
    _kind("checkpoint, bytes", 200, BEGUN, checkpoint_bytes, ("resume", "evaluate"), exact=True),
    _kind("checkpoint, content", 200, BEGUN, checkpoint_content, ("resume", *READERS)),
    _kind("model.safetensors", 120, FINISHED, weights, READERS),
    _kind("model.json", 160, FINISHED, model_card, READERS),
    _kind("metrics.jsonl", 120, BEGUN, metrics, ("resume", "report")),
    _kind("config.yaml", 120, BEGUN, settings, ("resume", "report", "sheet", "doctor")),
    _kind("other files", 40, BEGUN, other_files, ("resume", "report", "evaluate")),
    _kind("special files", 80, FINISHED, special_files, ("resume", "report", "sheet", "doctor", *READERS)),
]
