"""Trains recipes for as many epochs as fit into the time, and reports their scores.

    python -m sdpnet.gpu_checks.programs.accuracy --recipes cifar10_gpu=SHARDS,NAME=FOLDER --seconds 300 --work DIR

The recipes share the time equally. Each first trains for two epochs, which shows how long an epoch takes (and leaves
compiled code in torch's cache), and then from the beginning for the epochs that fit. The learning rate ends with them:
`optim.schedule=cosine`, and a warm-up of at most a fifth of the epochs. Everything else that a recipe counts in epochs
is scaled with them.

`--recipes tiny_imagenet=FOLDER` means several recipes in the order of what they are worth (`SETS`). Each of these takes
the time that its own epochs need, or all that is left; what does not fit any more is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from sdpnet.config.length import with_epochs
from sdpnet.config.load import load_config
from sdpnet.config.options import Config
from sdpnet.gpu_checks.programs.commands import run_module
from sdpnet.lab.compute import mean_share
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["SETS", "add_arguments", "epochs_that_fit", "main", "parse_recipes", "run"]

PILOT_EPOCHS: Final = 2
MARGIN: Final = 1.08  # epochs vary
FIXED: Final = 0.2  # the share of an epoch's time that smaller images do not make shorter: a guess
CHECKS: Final = 4  # evaluations of a run
NO_RECIPE: Final = "looks like NAME=SHARDS or NAME=FOLDER, with commas between recipes"
# A folder of configs -> its recipes for GPUs, in the order of what their results are worth.
SETS: Final = {"tiny_imagenet": ("fast40", "patch4", "modern", "seed", "fast16", "fast100")}


def parse_recipes(text: str) -> dict[str, Path]:
    """Config -> data. Raises `UserError` if the text does not look like `NAME=PATH,NAME=PATH`."""
    recipes = {}
    for word in text.split(","):
        name, equals, path = word.partition("=")
        if not name or not equals or not path:
            raise UserError(f"--recipes {text}: {NO_RECIPE}")
        for config in [f"{name}/{one}" for one in SETS[name]] if name in SETS else [name]:
            load_config(config)  # reports a name that does not exist
            recipes[config] = Path(path).absolute()
        if not Path(path).exists():
            raise UserError(f"--recipes {text}: {path} does not exist")
    return recipes


def is_of_a_set(recipe: str) -> bool:
    """Whether a recipe is trained for its own epochs at most, because the recipes of its set are compared."""
    folder, _, name = recipe.rpartition("/")
    return name in SETS.get(folder, ())


def epochs_that_fit(seconds: float, epoch_seconds: float, other_seconds: float) -> int:
    """The number of epochs that fit into the time beside `other_seconds` for the start and the evaluations."""
    return max(0, math.floor((seconds - other_seconds) / (MARGIN * epoch_seconds)))


def _train(recipe: str, data: Path, out: Path, more: list[str], device: str) -> tuple[list[dict[str, Any]], float]:
    """Trains. Returns the metrics and the seconds that it took."""
    began = time.perf_counter()
    words: list[str | Path] = ["--config", recipe, "--data", data, "--out", out, f"train.device={device}", *more]
    run_module("sdpnet.train", words)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], time.perf_counter() - began


def _shards(data: Path, work: Path) -> Path:
    """The shard set in `data`, or one that is made of the images in it, or of those in its archives (*.tar.xz)."""
    if (data / "manifest.json").is_file():
        return data
    out = work / f"shards-{data.name}"
    if not (out / "manifest.json").is_file():
        source = data
        if archives := sorted(data.glob("*.tar*")):
            source = work / f"images-{data.name}"
            for path in archives:
                with tarfile.open(path) as archive:
                    archive.extractall(source, filter="data")
        run_module("sdpnet.preprocess.build_ffcv", ["--source", source, "--out", out, "--reencode", "auto"])
    return out


def _one(recipe: str, data: Path, seconds: float, work: Path, device: str, settings: list[str]) -> dict[str, Any]:
    began = time.perf_counter()
    for name in ("pilot", "run"):
        shutil.rmtree(work / name, ignore_errors=True)
    shards = _shards(data, work)
    config = load_config(recipe, settings)
    pilot = ["optim.warmup_epochs=1", "optim.schedule=cosine", "train.log_interval=1"]
    first = _shortened(config, PILOT_EPOCHS, [*settings, *pilot])
    lines, took = _train(recipe, shards, work / "pilot", first, device)
    steps = [line["step_ms"] for line in lines if line["epoch"] == PILOT_EPOCHS - 1 and "step_ms" in line]
    epoch_seconds = sum(steps) / 1000
    left = seconds - (time.perf_counter() - began)
    num_classes = len(read_manifest(shards).classes)
    mean_seconds = epoch_seconds * (FIXED + (1 - FIXED) * mean_share(config, num_classes))
    epochs = epochs_that_fit(left, mean_seconds, took - epoch_seconds)
    if is_of_a_set(recipe):
        epochs = min(epochs, config.train.epochs)
    result: dict[str, Any] = {"recipe": recipe, "data": data.name, "epoch_seconds": epoch_seconds, "epochs": epochs}
    if epochs < PILOT_EPOCHS:
        return {**result, "not_measured": f"an epoch takes {epoch_seconds:,.1f} s and {left:,.0f} s are left"}
    own = [f"train.eval_interval={-(-epochs // CHECKS)}", "optim.schedule=cosine"]
    own.append(f"optim.warmup_epochs={min(config.optim.warmup_epochs, max(1.0, epochs / 5)):g}")
    own = _shortened(config, epochs, [*settings, *own])
    lines, took = _train(recipe, shards, work / "run", own, device)
    scores = [line for line in lines if "top1" in line]
    return {**result, "seconds": took, "settings": own, "scores": scores, "last": scores[-1]}


def _shortened(config: Config, epochs: int, settings: list[str]) -> list[str]:
    """The settings that train a recipe for so many epochs, followed by `settings`."""
    changed = with_epochs(config, epochs)
    scaled = [f"train.epochs={epochs}", f"train.full_patch_epochs={changed.train.full_patch_epochs}"]
    scaled += [f"resolution.{key}={value}" for key, value in asdict(changed.resolution).items()]
    return [*scaled, *settings]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--recipes",
        required=True,
        metavar="NAME=DATA,...",
        help="configs, each with its shard set or folder of images or archives; a set of configs: tiny_imagenet=DATA",
    )
    add("--seconds", type=float, required=True, metavar="S", help="time for all of them")
    add(
        "--work",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory for shards and runs, which is emptied first and removed at the end",
    )
    add("--settings", default="", metavar="KEY=VALUE,...", help="further config keys, for all recipes")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")


def run(arguments: argparse.Namespace) -> int:
    recipes: Mapping[str, Path] = parse_recipes(arguments.recipes)
    settings = [word for word in arguments.settings.split(",") if word]
    began, results = time.perf_counter(), []
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    for number, (recipe, data) in enumerate(recipes.items()):
        left = arguments.seconds - (time.perf_counter() - began)
        share = left if is_of_a_set(recipe) else left / (len(recipes) - number)
        results.append(_one(recipe, data, share, arguments.work, arguments.device, settings))
        if arguments.json is not None:  # after each recipe, in case the time ends
            publish_bytes(arguments.json, (json.dumps({"recipes": results}, indent=1) + "\n").encode())
    shutil.rmtree(arguments.work, ignore_errors=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_alone("accuracy", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
