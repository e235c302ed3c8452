"""Mutated shard sets: each kind of file in a set, changed in a seeded way, and read by every reader."""

from __future__ import annotations

import contextlib
import io
import json
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from conversion import convert_folder
from in_place_sets import adopt_images
from PIL import Image
from trial import Kind, Outcome

from sdpnet.preprocess.adoption.look import Look
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.conversion.writers.tar import TarWriter

__all__ = ["KINDS"]

SILENCE = 60  # seconds: then a trial hangs; its ways to read have 10 s each
CLASSES = ("ant", "bee", "cow")


def prepare(folder: Path) -> str:
    """A small set in each format, also in place: images of 24 to 90 pixels a side, two of them bad."""
    rng = np.random.default_rng(7)
    for split, count in (("train", 6), ("val", 3)):
        for name in CLASSES:
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(24, 90, 2)
                small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
                small.resize((int(width), int(height))).save(folder / "images" / split / name / f"{number}.jpg")
        (folder / "images" / split / "bee" / "bad.jpg").write_text("no image")
    writers = {"beton": partial(BetonWriter, page_size=1 << 14), "tar": partial(TarWriter, shard_bytes=10_000)}
    with contextlib.redirect_stderr(io.StringIO()):  # how far it is
        for format, writer in writers.items():
            convert_folder(folder / "images", folder / format, writer, on_bad="skip")
        adopt_images(folder / "images", folder / "index", Look(checksums=True), "skip")
    return str(folder)


def run(kind: str, prepared: str, seeds: Sequence[int], scratch: Path) -> Iterator[Outcome]:
    """Runs the trials in a child, and goes on in another one where that ends or hangs."""
    waiting = list(seeds)
    while waiting:
        part = scratch / f"from{waiting[0]}"
        part.mkdir()
        for outcome in _run_child(kind, prepared, waiting, part):
            waiting.pop(0)
            yield outcome
        shutil.rmtree(part, ignore_errors=True)


def _run_child(kind: str, prepared: str, seeds: list[int], scratch: Path) -> Iterator[Outcome]:
    """The outcomes that a child gives, and for the trial in which it ends, that."""
    command = [sys.executable, str(Path(__file__).with_name("shard_reading.py")), prepared, kind, str(scratch)]
    with (scratch / "stderr").open("w+b") as errors:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(" ".join(map(str, seeds)).encode())
        child.stdin.close()
        for count in range(len(seeds)):
            hangs = not select.select([child.stdout], [], [], SILENCE + 60 * (count == 0))[0]
            line = b"" if hangs else child.stdout.readline()
            if line:
                yield Outcome(**json.loads(line))
                continue
            child.kill()
            status = child.wait()
            errors.seek(0)
            last = errors.read()[-600:].decode(errors="replace").strip()
            yield Outcome("hung" if hangs else "crashed", f"the process ended with status {status}: {last!r}")
            break
        child.stdout.close()
        child.kill()
        child.wait()


def _kind(name: str, trials: int, **options: Any) -> Kind:
    started: Callable[..., Iterator[Outcome]] = partial(run, name)
    return Kind(f"shard set: {name}", trials, prepare, started, batch=125, **options)


KINDS: list[Kind] = [
    _kind("manifest.json", 1000),
    _kind(".beton", 1000),
    _kind(".crc32", 300),
    _kind(".tar", 700),
    _kind(".samples", 700),
    _kind(".idx", 300),
    _kind(".index", 1000),
    _kind("quarantine.jsonl", 500),
    _kind("special files", 400),
    _kind("hostile images", 600),
    _kind("in use: native", 300),
    _kind("in use: torchvision", 100),
    _kind("in use: dali", 100),
    _kind("in use: ffcv", 50),
    _kind("special files beside an index", 200),
    _kind("in use in place: native", 300),
    _kind("in use in place: torchvision", 100),
    _kind("in use in place: dali", 100),
]
