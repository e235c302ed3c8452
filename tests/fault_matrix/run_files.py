"""What is changed in a run's directory: each function harms one kind of file and says what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mutations import HOSTILE, change_bytes, change_tree, json_text, replace_file

__all__ = [
    "Mutate",
    "checkpoint_bytes",
    "checkpoint_content",
    "metrics",
    "model_card",
    "other_files",
    "settings",
    "special_files",
    "weights",
]

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
