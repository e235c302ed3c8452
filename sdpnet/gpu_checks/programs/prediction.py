"""Compares what `sdpnet doctor --data` expects with what a short training then reaches.

    python -m sdpnet.gpu_checks.programs.prediction --data SHARDS --work DIR --json FILE

Both get the same config, batch size and image size. The training's rate is the median of its metrics after the first
epoch, which compiles. The time that it reports waiting for data is compared with the time that its rate implies: a step
that never waited would run at the rate that `doctor` measured for the step alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from sdpnet.gpu_checks.programs.commands import run_module
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["add_arguments", "comparison", "main", "run"]


def comparison(facts: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The prediction beside the training.

    Args:
        facts: the JSON of `sdpnet doctor`.
        lines: the metrics of the training.

    Raises:
        UserError: the training reported nothing after its first epoch.
    """
    settled = [line for line in lines if "images_per_second" in line and line["epoch"] > 0]
    if not settled:
        raise UserError("the training reported no rate after its first epoch")
    rate, waiting = (
        statistics.median(line[name] for line in settled) for name in ("images_per_second", "data_wait_fraction")
    )
    expected, alone = facts["expected_images_per_second"], facts["rates"]["step"]
    return {
        "expected_images_per_second": expected,
        "trained_images_per_second": rate,
        "ratio": expected / rate,
        "step_alone_images_per_second": alone,
        "reported_waiting": waiting,
        "implied_waiting": max(0.0, 1 - rate / alone),
        "doctor": facts["verdict"][0],
        "rates": [line["images_per_second"] for line in settled],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="SHARDS", help="shard set")
    add("--work", type=Path, required=True, metavar="DIR", help="directory for the run, which is removed at the end")
    add("--config", default="sdpnet_xl", help="default: %(default)s")
    add("--batch-size", type=int, default=256, metavar="N", help="default: %(default)s")
    add("--image-size", type=int, default=224, metavar="N", help="default: %(default)s")
    add("--epochs", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--log-interval", type=int, default=13, metavar="N", help="steps (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")


def run(arguments: argparse.Namespace) -> int:
    """Prints both rates. Returns 1 if they could not be measured; a wrong prediction is no error."""
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    config = arguments.work / "config.yaml"
    config.write_text(
        f"extends: {arguments.config}\n"
        f"data: {{batch_size_per_gpu: {arguments.batch_size}, image_size: {arguments.image_size}}}\n"
        f"optim: {{warmup_epochs: 1, schedule: cosine}}\n"
        f"train: {{epochs: {arguments.epochs}, eval_interval: {arguments.epochs}, "
        f"log_interval: {arguments.log_interval}}}\n",
        encoding="utf-8",
    )
    both = ["--config", str(config), "--data", arguments.data]
    facts = json.loads(run_module("sdpnet.cli", ["doctor", *both, "--step", "--json"], stdout=subprocess.PIPE))
    print(*facts["rates"]["problems"], *facts["verdict"], sep="\n", flush=True)
    out = arguments.work / "run"
    run_module("sdpnet.train", [*both, "--out", out])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = comparison(facts, lines)
    expected, trained = (result[f"{name}_images_per_second"] for name in ("expected", "trained"))
    print(f"expected {expected:,.0f} images/s, trained {trained:,.0f}: {result['ratio']:.2f}")
    waiting = f"reported {result['reported_waiting']:.1%}, implied by the rate {result['implied_waiting']:.1%}"
    print(f"waiting for data: {waiting}")
    if arguments.json is not None:
        publish_bytes(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    shutil.rmtree(arguments.work)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_alone("prediction", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
