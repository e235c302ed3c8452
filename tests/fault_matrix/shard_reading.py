"""Reads changed shard sets in every way, in a process of its own: `shard_reading.py PREPARED KIND SCRATCH`.

The seeds come on stdin. Prints a line of JSON for each: verdict, what, group. Whoever started it kills it when no line
comes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shard_changes import CHANGES, Change
from trial import Outcome

from sdpnet import train
from sdpnet.config.load import load_config
from sdpnet.pipelines.contract import Loader
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.loader import make_loader
from sdpnet.pipelines.options import ShardOptions
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.preprocess import describe as report
from sdpnet.preprocess.inspection.page import page
from sdpnet.preprocess.inspection.survey import survey
from sdpnet.preprocess.verify import verify

__all__ = ["BATCH", "Ended", "attempt", "loader_of", "memory_in_use", "result_of"]

BATCH = 4
SECONDS = 10  # of one way to read
MEMORY = 500 << 20  # bytes, beyond what the process had before
TRAINED, REPORTED = 10, 10  # one set of so many that verify passed is trained on, and reported on with images
BY_DALI = 8  # and one of so many is read by DALI too, whose decoder need not agree
LONGEST_LINE = 2000


class Ended(Exception):
    """A way to read ended badly."""

    def __init__(self, verdict: str, what: str) -> None:
        super().__init__(what)
        self.verdict = verdict


class _TooLong(BaseException):
    """Not an `Exception`, which code under test might catch."""


def attempt(name: str, read: Callable[[], Any]) -> tuple[Any, str]:
    """What `read` returned and "", or None and the line that it ended with; raises `Ended` for any other end."""

    def stop(*_: object) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return read(), ""
    except UserError as error:
        line = str(error)
    except _TooLong:
        raise Ended("hung", f"{name}: longer than {SECONDS} s") from None
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{name}: {type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
        raise Ended("crashed", text) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", line) or len(line) > LONGEST_LINE:
        raise Ended("wrong", f"{name}: not a line to print, of {len(line)} characters: {line[:100]!r}")
    return None, line or "an empty message"


def loader_of(folder: Path, pipeline: str, split: str, **options: Any) -> Loader:
    config = load_config("debug", ["model.patch_size=8"])
    options = {"batch_size_per_gpu": BATCH, "num_workers": 1, "image_size": 32, **options}
    data = replace(config.data, path=str(folder), pipeline=pipeline, val_split=split, train_split=split, **options)
    kind: Any = "train" if split == "train" else "val"
    return make_loader(data, config.augment, kind, ShardOptions(), torch.device("cpu"), seed=config.seed)


def batches_of(folder: Path, pipeline: str, split: str, image_size: int) -> int:
    with contextlib.closing(loader_of(folder, pipeline, split, image_size=image_size)) as loader:
        return sum(int(batch.valid.sum()) for batch in loader.batches())


def images_of(folder: Path, split: str) -> int:
    _, reader = open_split(folder, split)
    return sum(len(reader.encoded(sample).tobytes()) for sample in range(reader.num_samples))


def trained(folder: Path, out: Path) -> None:
    """A whole training; raises `UserError` with what it said."""
    settings = [f"data.batch_size_per_gpu={BATCH}", "data.num_workers=1", "train.epochs=1", "data.image_size=16"]
    command = ["--config", "debug", "--pipeline", "native", "--data", str(folder), "--out", str(out)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train.main(command + [part for setting in settings for part in ("--set", setting)])
    shutil.rmtree(out, ignore_errors=True)
    if status:
        raise UserError(said.getvalue().strip().splitlines()[-1])


def reported(folder: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = report.main([str(folder), "--images", "2"])
    if status:
        raise UserError(said.getvalue().strip().splitlines()[-1])


def problems_of(folder: Path) -> list[str]:
    return [str(problem) for problem in verify(folder, decode=True)]


def result_of(folder: Path, change: Change, seed: int) -> Outcome:
    """How a changed set is read in every way; verify and the readers must agree."""
    problems, refusal = attempt("verify", lambda: problems_of(folder))
    refusal = refusal or "; ".join(problems or [])
    if change.must_be_found and not refusal:
        raise Ended("wrong", "verify found nothing")
    attempt("verify --quick", lambda: list(verify(folder, quick=True)))
    ends = {"survey": attempt("survey", lambda: page(survey(folder), [], None).encode())[1]}
    manifest, ends["manifest"] = attempt("manifest", lambda: read_manifest(folder))
    image_size = (8, 32)[seed % 2]
    counts = {} if manifest is None else {name: split.num_samples for name, split in manifest.splits.items()}
    for split, count in counts.items():
        ends[f"images of {split}"] = attempt(f"images of {split}", lambda split=split: images_of(folder, split))[1]
        if not count or (split == "train" and count < BATCH):
            continue
        for pipeline in ("native", "torchvision"):
            name = f"{pipeline} on {split}"
            found, ends[name] = attempt(name, lambda p=pipeline, s=split: batches_of(folder, p, s, image_size))
            expected = count - count % BATCH if split == "train" else count
            if found not in (None, expected):
                raise Ended("wrong", f"{name}: {found} samples of {expected}")
        if seed % BY_DALI == 0:
            attempt(f"dali on {split}", lambda split=split: batches_of(folder, "dali", split, image_size))
        if ends[f"native on {split}"] and not ends[f"torchvision on {split}"]:
            raise Ended("wrong", f"only native refuses {split}: {ends[f'native on {split}']}")
    if not refusal:
        for name, end in ends.items():
            if end:
                raise Ended("wrong", f"verify passed it, but {name}: {end}")
        trains = counts.get("train", 0) >= BATCH and counts.get("val", 0) > 0
        for name, often, read in (
            ("report", REPORTED, lambda: reported(folder)),
            ("training", TRAINED, lambda: trained(folder, folder.with_name(f"{folder.name}-run"))),
        ):
            if seed % often == 0 and (trains or name == "report"):
                _, end = attempt(name, read)
                if end:
                    raise Ended("wrong", f"verify passed it, but {name}: {end}")
    return Outcome("ok", group="refused" if refusal else "passed")


def memory_in_use(of: str) -> int:
    """Bytes: VmRSS, or VmHWM since the last call."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{of}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) << 10


def trial(prepared: Path, kind: str, seed: int, scratch: Path) -> Outcome:
    rng = random.Random(f"{kind} {seed}")
    format, make = CHANGES[kind]
    source = prepared / (rng.choice(("beton", "tar")) if format == "any" else format)
    folder = scratch / f"set{seed}"
    folder.mkdir()
    if format == "index" and not (scratch / "images").exists():
        (scratch / "images").symlink_to(prepared / "images")  # where the index expects them
    for path in source.iterdir():
        os.link(path, folder / path.name)
    change = make(folder, rng)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = memory_in_use("VmRSS")
    try:
        outcome = result_of(folder, change, seed)
        if memory_in_use("VmHWM") - before > MEMORY:
            raise Ended("crashed", f"{(memory_in_use('VmHWM') - before) >> 20:,} MiB of memory")
    except Ended as ended:
        outcome = Outcome(ended.verdict, f"{source.name}, {change.what}: {ended}")
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def load_everything(good: Path, scratch: Path) -> None:
    """Reads an unchanged set in every way: imports cannot be ended half-way, and must not take a trial's time."""
    good = shutil.copytree(good, scratch / "good")  # a report lies in the set
    for pipeline in ("native", "torchvision", "dali"):
        with contextlib.suppress(UserError):  # not installed
            batches_of(good, pipeline, "val", 32)
    reported(good)
    trained(good, scratch / "first-run")


def seeds() -> Iterator[int]:
    yield from map(int, sys.stdin.read().split())


def main() -> None:
    prepared, kind, scratch = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    np.seterr(all="raise", under="ignore")
    lines = os.fdopen(os.dup(1), "w")  # whatever else is printed goes elsewhere
    os.dup2(2, 1)
    run: Callable[[Path, str, int, Path], Outcome] = trial
    if kind.startswith("in use"):
        from shard_in_use import trial as run
    load_everything(prepared / "beton", scratch)
    for seed in seeds():
        print(json.dumps(asdict(run(prepared, kind, seed, scratch))), file=lines, flush=True)


if __name__ == "__main__":
    main()
