"""Times training steps part by part, models and feeds by turns: `sdpnet bench step [--data SHARDS]`.

Each row is a model on a feed: fixed noise on the device (`synthetic`), or a pipeline that reads shards. An SdP-Net
takes the same step that `train` takes with the config of that name, including dropout, clipping and accumulation.
Models of timm take the step of the seed recipe. All have batches and images of the same size and run in one process.
The order is reversed from round to round, and the first round does not count. The rate of large matrix products is
measured between the rounds; the share of it that a step reaches shows how much could still be gained.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from sdpnet.benchmarks.step_race import SYNTHETIC, recipe_of, run_race
from sdpnet.benchmarks.step_report import Page, record, tables
from sdpnet.config.setting import text_setting
from sdpnet.execution.hardware import choose_step, look_at
from sdpnet.flags.bench_step import FEEDS, MODELS_BY_DEFAULT, PEERS, add_arguments
from sdpnet.model.options import MODELS
from sdpnet.pipelines.errors import UserError, nearest, printable, require
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet
from sdpnet.pipelines.terminal.status_line import StatusLine

__all__ = ["MODELS_BY_DEFAULT", "PEERS", "add_arguments", "main", "run"]

_COMPILE: Final = {"auto": "auto", "yes": "true", "no": "false"}


def run(arguments: argparse.Namespace) -> int:
    """Prints tables and, with `--json`, writes a record. Returns 1 if nothing could be measured."""
    models = list(dict.fromkeys(arguments.model.split(",")))
    if unknown := [name for name in models if name.startswith("sdpnet") and name not in MODELS]:
        raise UserError(f"--model {arguments.model}: no {unknown[0]!r}: {nearest(unknown[0], MODELS)}")
    require(arguments.rounds >= 1, "--rounds", arguments.rounds, "at least 1")
    even = arguments.batch_size >= 2 and arguments.batch_size % 2 == 0
    require(even, "--batch-size", arguments.batch_size, "an even number from 2: MixUp and CutMix mix pairs")
    require(0.01 <= arguments.seconds <= 600, "--seconds", arguments.seconds, "from 0.01 to 600")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; sdpnet doctor says why")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: its directory does not exist")
    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json}: is a directory; give the name of a file")
    page = None if arguments.markdown is None else Page(arguments.markdown)
    feeds, num_classes = [SYNTHETIC], 1000
    settings = [f"data.image_size={arguments.image_size}", f"data.batch_size_per_gpu={arguments.batch_size}"]
    if arguments.data:
        names = list(dict.fromkeys(arguments.pipelines.split(",")))
        if unknown := [name for name in names if name not in FEEDS]:
            raise UserError(f"--pipelines {arguments.pipelines}: no {unknown[0]!r}: {nearest(unknown[0], FEEDS)}")
        feeds += names
        settings.append(text_setting("data.path", arguments.data))
        manifest, reader = open_split(arguments.data, "train")
        num_classes = max(num_classes, len(manifest.classes))
        limit = f"at most {reader.num_samples}, the samples of the split"
        require(arguments.batch_size <= reader.num_samples, "--batch-size", arguments.batch_size, limit)
    settings += [f"train.amp={arguments.amp}", f"train.compile={_COMPILE[arguments.compile]}"]
    for name in models:  # so that a mistake in the arguments is reported before anything is measured
        recipe_of(name, settings)
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    card = look_at(device)
    wanted = recipe_of("sdpnet_xl", settings).train
    choices = choose_step(card, amp=wanted.amp, compile=wanted.compile)
    console = Console(highlight=False)
    title = f"{card.name}, {arguments.image_size} px, batches of {arguments.batch_size}"
    console.print(f"step: {choices}\n", markup=False, soft_wrap=True)
    with StatusLine() as say:
        race = run_race(
            models,
            feeds,
            settings,
            num_classes,
            device,
            choices,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            say=say,
        )
    for note in race.notes:
        console.print(printable(note), markup=False, soft_wrap=True)
    for table in tables(race, title):
        console.print(table)
        console.print()
    for entry in race.entries:
        if entry.reason:
            console.print(printable(f"{entry.model}, {entry.feed}: {entry.reason}"), markup=False, soft_wrap=True)
    if race.matmul_rates:
        console.print(f"large matrix products: {statistics.median(race.matmul_rates) / 1e12:,.2f} TFLOP/s")
    if race.augment_seconds:
        console.print(f"augmenting a batch, by itself: {1000 * statistics.median(race.augment_seconds):,.2f} ms")
    if race.copy_seconds:
        console.print(f"copying a batch to the GPU, by itself: {1000 * statistics.median(race.copy_seconds):,.2f} ms")
    if arguments.json is not None:
        command = f"sdpnet bench step {shlex.join(arguments.argv)}".strip()
        sizes = {name: getattr(arguments, name) for name in ("image_size", "batch_size", "rounds")}
        report = record(race, command, sizes, card, choices)
        publish_bytes(arguments.json, (json.dumps(report, indent=1) + "\n").encode())
    if page is not None:
        page.fill(race, f"{title}; {choices}", arguments.json)
    if not race.running:
        return 1
    if arguments.json is None:
        words = ("--data", Path(arguments.data)) if arguments.data else ()
        for line in next_lines(*sdpnet("doctor", *words)):
            console.print(line, markup=False, soft_wrap=True)
    return 0


def main(argv: list[str] | None = None, program: str = "sdpnet bench step") -> int:
    """The command line. Returns the exit status, which is 1 if nothing could be measured."""
    return run_alone(program, "Times training steps part by part, models and feeds by turns.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
