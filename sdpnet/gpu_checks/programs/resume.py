"""Trains, kills the training and resumes it: it must end where an uninterrupted training ends.

    python -m sdpnet.gpu_checks.programs.resume --data SHARDS --work DIR --json FILE

The commands are `train` and `train --resume`. The metrics of all steps are compared, and the bytes of the final
weights. On a GPU some sums are added in another order each time, so the losses of two equal trainings may differ by
rounding, and the exit status allows for `LIMIT`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from sdpnet.gpu_checks.programs.commands import environment, run_module
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["add_arguments", "difference", "main", "run"]

LIMIT: Final = 0.02  # the largest difference of a step's loss, relative
COMPARED: Final = ("epoch", "step", "train_loss", "lr", "top1", "val_loss")


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics so far, without a last one that is not complete."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float | None:
    """The largest relative difference of a value of two runs, or None if they are not lines of the same steps."""
    values = [[{key: line[key] for key in COMPARED if key in line} for line in lines] for lines in (one, other)]
    if [(line["step"], sorted(line)) for line in values[0]] != [(line["step"], sorted(line)) for line in values[1]]:
        return None
    pairs = [(mine[key], theirs[key]) for mine, theirs in zip(*values, strict=True) for key in mine]
    return max((abs(a - b) / max(abs(a), abs(b)) for a, b in pairs if a != b), default=0.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="SHARDS", help="shard set")
    add("--work", type=Path, required=True, metavar="DIR", help="directory for the runs, which is removed at the end")
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--epochs", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if the resumed training differs from the uninterrupted one."""
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    common = [
        *("--config", "debug", "--data", arguments.data),
        *(f"data.batch_size_per_gpu={arguments.batch_size}", f"train.epochs={arguments.epochs}"),
        *(f"train.device={arguments.device}", "train.compile=false"),
    ]

    whole, broken = arguments.work / "whole", arguments.work / "killed"
    run_module("sdpnet.train", [*common, "--out", whole])
    last = max(line["step"] for line in _metrics(whole))
    common.append(f"train.checkpoint_interval={max(1, last // 6)}")  # two or three before the kill
    command = [sys.executable, "-m", "sdpnet.train", *common, "--out", str(broken)]
    process = subprocess.Popen(command, env=environment())
    try:
        while process.poll() is None and max([0, *(line["step"] for line in _metrics(broken))]) < last // 2:
            time.sleep(0.005)
    finally:
        process.kill()
    killed = process.wait() == -signal.SIGKILL
    at = max([0, *(line["step"] for line in _metrics(broken))])
    print(f"killed after step {at} of {last}" if killed else "the training ended before it was killed", flush=True)
    run_module("sdpnet.train", [*common, "--out", broken, "--resume"])
    largest = difference(_metrics(whole), _metrics(broken))
    weights = [(directory / "model.safetensors").read_bytes() for directory in (whole, broken)]
    same = weights[0] == weights[1]
    result = {
        "device": arguments.device,
        "steps": last,
        "killed_after": at if killed else None,
        "largest_difference": largest,
        "weights_same_to_the_bit": same,
    }
    if arguments.json is not None:
        publish_bytes(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    shutil.rmtree(arguments.work)
    print(f"largest relative difference of a metric: {largest}; weights {'the same' if same else 'not the same'} bits")
    return 0 if killed and largest is not None and largest <= LIMIT else 1


def main(argv: list[str] | None = None) -> int:
    return run_alone("resume", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
