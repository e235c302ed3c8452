"""Seeded changes to bytes, to JSON and to the folders that files lie in."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["HOSTILE", "NAMES", "change_bytes", "change_tree", "json_text", "replace_file"]

NAMES = ("\ud800", "x\x1b[2J\x9b", "a\nb", "\u202ecod.exe", "=cmd|' /C calc'!A0", "\udce9", "", "n" * 100_000)
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, -64, 1, 3, 10**9, 2**63, 2**70, -(2**70), 10**400),
    *(0.0, -0.5, 0.1, 1.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *NAMES,
    *([], {}, [1, 2], [1, 2, 3], [0.5, "x", 0.5], {"a": 1}, ["x"] * 5000),
)


def change_bytes(data: bytes, rng: np.random.Generator, others: bytes = b"") -> tuple[bytes, str]:
    """The bytes with one or more changes, and what was done. `others`: of another file, for pieces of it."""
    size = max(1, len(data))
    at, length = int(rng.integers(size)), 1 + int(rng.integers(max(1, min(4096, size // 4))))
    changed = bytearray(data)
    kind = int(rng.integers(12))
    if kind <= 3:
        count = int(2 ** rng.integers(7))
        for _ in range(count):
            if changed:
                changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        return bytes(changed), f"{count} bits turned"
    if kind == 4:
        return bytes(changed[:at]), f"cut to {at} bytes"
    if kind == 5:
        changed[at : at + length] = bytes(min(length, len(changed) - at))
        return bytes(changed), f"{length} zeros at {at}"
    if kind == 6:
        changed[at : at + length] = rng.bytes(length)
        return bytes(changed), f"{length} random bytes at {at}"
    if kind == 7:
        del changed[at : at + length]
        return bytes(changed), f"{length} bytes at {at} removed"
    if kind == 8:
        changed[at:at] = rng.bytes(length)
        return bytes(changed), f"{length} random bytes inserted at {at}"
    if kind == 9:
        changed[at:at] = changed[at : at + length]
        return bytes(changed), f"{length} bytes at {at} twice"
    if kind == 10:
        return bytes(changed + (others or rng.bytes(length))), "more behind its end"
    choices = [b"", b"\0", others, rng.bytes(length), b"\xff\xfe" + data[:100], b"[" * 200_000, b'{"a":' * 100_000]
    chosen = choices[int(rng.integers(len(choices)))]
    return chosen, f"replaced by {len(chosen)} bytes that begin {chosen[:8]!r}"


def change_tree(tree: Any, rng: np.random.Generator, hostile: tuple[Any, ...] = HOSTILE) -> tuple[Any, str]:
    """A tree of dicts and lists with a value at a random place replaced, removed, added or moved; and what was done."""
    places: list[tuple[Any, Any, str]] = []

    def walk(node: Any, where: str) -> None:
        items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items):
            places.append((node, key, f"{where}.{key}"))
            walk(value, f"{where}.{key}")

    walk(tree, "")
    value = hostile[int(rng.integers(len(hostile)))]
    shown = f"{value!r:.60}" if not isinstance(value, int) or abs(value) < 2**80 else "a huge number"
    if not places or rng.random() < 0.04:
        return value, f"all of it {shown}"
    parent, key, where = places[int(rng.integers(len(places)))]
    kind = rng.random()
    if kind < 0.7:
        parent[key] = value
        return tree, f"{where} = {shown}"
    if kind < 0.85:
        del parent[key]
        return tree, f"{where} removed"
    if isinstance(parent, dict):
        parent[NAMES[int(rng.integers(len(NAMES)))][:1000] if kind < 0.92 else "unknown"] = value
        return tree, f"beside {where} another key = {shown}"
    parent.append(value)
    return tree, f"{where}: one more, {shown}"


def json_text(tree: Any, rng: np.random.Generator) -> tuple[bytes, str]:
    """JSON of the tree; now and then with a deep nest, or a number of thousands of digits, in the place of a number."""
    text = json.dumps(tree, default=str)
    if rng.random() < 0.15:
        nest = [
            "[" * 100_000 + "]" * 100_000,
            '{"a":' * 50_000 + "1" + "}" * 50_000,
            "9" * 10_000,
            "[" * 900 + "]" * 900,
        ]
        chosen = nest[int(rng.integers(len(nest)))]
        digits = [i for i, char in enumerate(text) if char.isdigit() and not text[i - 1 : i].isdigit()]
        if digits:
            at = digits[int(rng.integers(len(digits)))]
            return (text[:at] + chosen + text[at + 1 :]).encode(), f", and {chosen[:5]}... {len(chosen)} long at {at}"
    return text.encode(), ""


def replace_file(path: Path, rng: np.random.Generator) -> str:
    """Puts something else than a good file in the place of one; what that is."""
    kinds: dict[str, Callable[[], object]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a folder with a file": lambda: (path.mkdir(), (path / "x").touch()),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a link to /dev/full": lambda: path.symlink_to("/dev/full"),
        "a link to /proc/self/mem": lambda: path.symlink_to("/proc/self/mem"),
        "a socket": lambda: _socket(path),
        "a terabyte of nothing": lambda: _sparse(path, 1 << 40),
        "a gigabyte of nothing": lambda: _sparse(path, 1 << 30),
        "nothing": lambda: None,
        "an empty file": path.touch,
    }
    name = str(rng.choice(sorted(kinds)))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    kinds[name]()
    return name


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_RDONLY)
        try:
            listener.bind(f"/proc/self/fd/{here}/{path.name}")  # its whole path may be too long for a socket
        finally:
            os.close(here)
