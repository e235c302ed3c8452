"""Mutated run directories: checkpoints, weights, model cards, metrics and settings, changed in a seeded way.

Each is read by commands that read a run, in forked children under limits. A command may refuse it in one line, or work;
what was changed byte by byte must not change a resumed run's weights, because a checkpoint notices that.
"""

from __future__ import annotations

import atexit
import json
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
from mutations import HOSTILE, change_bytes, change_tree, json_text, replace_file
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
        from sdpnet.report import Reporter

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


Mutate = Callable[[Path, np.random.Generator], str]


def checkpoint_bytes(run: Path, rng: np.random.Generator) -> str:
    """The newest one; the one before it is good."""
    *_, before, newest = sorted((run / "checkpoints").glob("step_*.pt"))
    changed, what = change_bytes(newest.read_bytes(), rng, before.read_bytes()[:5000])
    newest.write_bytes(changed)
    return f"{newest.name}: {what}"


def checkpoint_content(run: Path, rng: np.random.Generator) -> str:
    """A checkpoint without a damaged byte, whose state is another."""
    import torch

    newest = max((run / "checkpoints").glob("step_*.pt"))
    state, what = torch.load(newest, weights_only=True), []
    tensors = (
        *(torch.tensor(float("nan")), torch.full((3,), float("inf")), torch.zeros(0), torch.zeros(2, 3).to(torch.int8)),
        *(torch.zeros(1).expand(1 << 40), torch.tensor(2**62), torch.zeros(64, 64, dtype=torch.float16)),
        *(torch.zeros(3, dtype=torch.float8_e4m3fn), torch.zeros(3, dtype=torch.complex64), torch.ones(3).to_sparse()),
    )
    plain = tuple(value for value in HOSTILE if not (isinstance(value, int) and abs(value) > 2**1000))
    for _ in range(1 + int(rng.integers(2))):
        if not isinstance(state, dict):
            break
        section = str(rng.choice(sorted(map(str, state))))
        hostile = tensors if rng.random() < 0.3 else plain
        changed, done = change_tree({section: _lists(state.get(section))}, rng, hostile)
        what.append(done)
        state = {**state, **changed} if isinstance(changed, dict) else changed
    torch.save(state, newest)
    return f"{newest.name}: {'; '.join(what)}"


def _lists(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _lists(value) for key, value in tree.items()}
    return [_lists(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def weights(run: Path, rng: np.random.Generator) -> str:
    """`model.safetensors`: its bytes, or its header; for half of them the card has no checksum that would tell."""
    path, card = run / "model.safetensors", run / "model.json"
    data = path.read_bytes()
    if rng.random() < 0.5:
        changed, what = change_bytes(data, rng)
    else:
        length = int.from_bytes(data[:8], "little")
        header, what = change_tree(json.loads(data[8 : 8 + length]), rng)
        text, more = json_text(header, rng)
        changed, what = len(text).to_bytes(8, "little") + text + data[8 + length :], f"header{what}{more}"
    path.write_bytes(changed)
    if rng.random() < 0.6:
        facts = json.loads(card.read_text())
        del facts["weights_sha256"]
        card.write_text(json.dumps(facts))
        what += ", no checksum"
    return f"model.safetensors: {what}"


def model_card(run: Path, rng: np.random.Generator) -> str:
    path = run / "model.json"
    data = path.read_bytes()
    if rng.random() < 0.2:
        changed, what = change_bytes(data, rng)
    else:
        tree, what = json.loads(data), ""
        for _ in range(1 + int(rng.integers(2))):
            tree, done = change_tree(tree, rng)
            what += done
        changed, more = json_text(tree, rng)
        what += more
    path.write_bytes(changed)
    return f"model.json: {what}"


def metrics(run: Path, rng: np.random.Generator) -> str:
    path = run / "metrics.jsonl"
    lines, what = path.read_bytes().splitlines(), ""
    if rng.random() < 0.3:
        changed, what = change_bytes(path.read_bytes(), rng)
    else:
        for _ in range(1 + int(rng.integers(6))):
            at = int(rng.integers(len(lines)))
            tree, done = change_tree(json.loads(lines[at]), rng)
            text, more = json_text(tree, rng)
            kind = rng.random()
            if kind < 0.6:
                lines = [*lines[:at], text, *lines[at + 1 :]]
            else:
                lines.insert(int(rng.integers(len(lines) + 1)), text)
            what += f"line {at}{done}{more}; "
            lines = [line for line in lines if _is_object(line)] or [b'{"step": 1}']
        keep = [text] if text not in lines else []
        changed = b"\n".join([*lines, *keep]) + b"\n"
    path.write_bytes(changed)
    return f"metrics.jsonl: {what}"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


YAML = (
    "a: &a [x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else '*a'}]\n" for i in range(12)),
    "seed: &s [*s]\n",
    "seed: !!int ''\n",
    "seed: !!timestamp 'x'\n",
    "seed: !!binary '='\n",
    "seed: !!python/name:os.system\n",
    "? [a, b]\n: 1\n",
    "seed: 2001-99-99\n",
    "- a\n- b\n",
    "seed: \t1\n",
    "extends: 5\n",
    "extends: [x]\n",
    "extends: config.yaml\n",
    "seed: " + "[" * 50_000 + "\n",
    "seed: " + "{a: " * 50_000 + "\n",
    'seed: "' + "x" * 2_000_000 + '"\n',
    "\0\0\0",
    "%YAML 9.9\n---\n",
    'seed: "\\uD800"\n',
    'model: {name: "\\x1b[2J"}\n',
    "seed: 1e400\n",
    "seed: 190:20:30\n",
    "seed: " + "9" * 5000 + "\n",
    "<<: [1]\n",
    'data: {path: "\\0"}\n',
    "data: {path: " + "p" * 5000 + "}\n",
    'extends: "a\\0b"\n',
    "extends: " + "e" * 3000 + "\n",
    "&a a: *a\n",
    "!!set {a, b}\n",
    "!!omap [a: 1]\n",
)


def settings(run: Path, rng: np.random.Generator) -> str:
    """`config.yaml`."""
    import yaml

    path = run / "config.yaml"
    data, kind = path.read_bytes(), rng.random()
    if kind < 0.25:
        changed, what = change_bytes(data, rng)
    elif kind < 0.5:
        text = YAML[int(rng.integers(len(YAML)))]
        changed, what = (text.encode() if rng.random() < 0.5 else data + text.encode()), f"{text[:60]!r}"
    else:
        tree, what = change_tree(yaml.safe_load(data), rng)
        changed, more = json_text(tree, rng)
        what += more
    path.write_bytes(changed)
    return f"config.yaml: {what}"


def other_files(run: Path, rng: np.random.Generator) -> str:
    """best.json, what torchrun noted, and what a killed run left."""
    name = str(rng.choice(["checkpoints/best.json", ".torchrun", ".lock", ".config.yaml.partial", "per_class.csv"]))
    path = run / name
    if name == "checkpoints/best.json":
        tree, what = change_tree({"step": 6, "score": 0.5}, rng)
        changed, more = json_text(tree, rng)
        what += more
    else:
        changed, what = change_bytes(path.read_bytes() if path.exists() else b'{"host": "x", "pid": 1}', rng)
    path.write_bytes(changed)
    return f"{name}: {what}"


def special_files(run: Path, rng: np.random.Generator) -> str:
    """Something else in the place of a file."""
    files = [path for path in sorted(run.rglob("*")) if path.name != ".lock"]
    path = files[int(rng.integers(len(files)))]
    return f"{path.relative_to(run)}: {replace_file(path, rng)}"


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
