"""Trains variants of a config with paired seeds at equal compute, and compares them in one table with standard errors.

Each training is one of the `train` command, in LAB/runs. After each of them LAB/lab.json has all results so far, and
LAB/lab.svg draws them. The same command, or `sdpnet lab --out LAB` alone, continues after an interruption; with more
variants or seeds it trains only what is missing.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sdpnet.flags.lab import add_arguments
from sdpnet.lab.experiment import Experiment, is_experiment, read_experiment
from sdpnet.lab.results import Comparison
from sdpnet.lab.runner import Runner
from sdpnet.lab.table import as_table, legend
from sdpnet.lab.variants import read_variants, variant_from_words, with_unique_names
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.files.atomic_write import exclusive
from sdpnet.pipelines.machine import commit, cpu_name, driver, installed_versions, usable_cores
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet
from sdpnet.reporting.output import say

__all__ = ["add_arguments", "run"]


def _experiment(arguments: argparse.Namespace) -> Experiment:
    """The experiment that the arguments ask for, or the one in --out if they ask for none."""
    described = ("config", "data", "variant", "variants", "set", "seeds", "epochs", "equal", "rounds")
    if not any(getattr(arguments, name) for name in described):
        return read_experiment(arguments.out)
    for name in ("config", "data"):
        if not getattr(arguments, name):
            continues = "; with --out alone, the experiment there continues" if is_experiment(arguments.out) else ""
            raise UserError(f"--{name} is missing{continues}")
    variants = read_variants(arguments.variants) if arguments.variants else []
    variants += [variant_from_words(words) for words in arguments.variant]
    if not variants:
        raise UserError("there is nothing to compare: pass --variant NAME KEY=VALUE ..., or --variants FILE")
    variants = [replace(one, config=_absolute(one.config)) if one.config else one for one in variants]
    config = Path(arguments.config)
    chosen = {name: getattr(arguments, name) for name in ("seeds", "epochs", "equal", "rounds")}
    experiment = Experiment(
        config=_absolute(arguments.config),
        data=str(Path(arguments.data).absolute()),
        settings=tuple(arguments.set),
        baseline=config.stem,
        variants=tuple(variants),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    with_unique_names(experiment.everyone)
    if arguments.minutes and experiment.epochs is None and is_experiment(arguments.out):
        before = read_experiment(arguments.out)
        same = replace(before, variants=experiment.variants, seeds=experiment.seeds, epochs=None) == experiment
        experiment = replace(experiment, epochs=before.epochs if same else None)
    return experiment


def _absolute(config: str) -> str:
    """A config's name, or the absolute path of its file, which is valid in any working directory."""
    return str(Path(config).absolute()) if Path(config).is_file() else config


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with the arguments of `add_arguments`; returns the exit status."""
    require(arguments.jobs >= 1, "--jobs", arguments.jobs, "at least 1")
    require(arguments.minutes is None or arguments.minutes > 0, "--minutes", arguments.minutes, "above 0")
    out: Path = arguments.out
    experiment = _experiment(arguments)
    num_classes = len(open_split(experiment.data, "train")[0].classes)
    configs = experiment.configs(num_classes)  # a mistake in any variant is reported before the first training
    require(
        all(config.model.num_classes in (None, num_classes) for config in configs.values()),
        "model.num_classes",
        "another number",
        f"null or {num_classes}, as in {experiment.data}",
    )
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock"):
        seconds = 60 * arguments.minutes if arguments.minutes else None
        runner = Runner(out, experiment, num_classes, jobs=arguments.jobs, seconds=seconds, facts=_facts())
        try:
            if seconds and experiment.epochs is None:
                runner.choose_epochs()
            complete = runner.run()
        except (KeyboardInterrupt, SystemExit):
            say(f"stopped; the trainings are saved, and sdpnet lab --out {shlex.quote(str(out))} continues")
            raise
        rows = runner.save()
    seeds = {one.seed for one in runner.results if (one.variant, one.round) == (rows[0].variant, rows[0].round)}
    Console(highlight=False).print(as_table(rows, runner.experiment))
    say(legend(runner.experiment, len(seeds)), f"all results: {out / 'lab.json'}, drawn: {out / 'lab.svg'}")
    if not complete:
        say("the time did not suffice for all trainings", *next_lines(*sdpnet("lab", "--out", out)))
    else:
        say(*next_lines(*sdpnet("report", *_worth_a_look(rows, runner))))
    return 0


def _worth_a_look(rows: Sequence[Comparison], runner: Runner) -> list[Path]:
    """The runs of the baseline and of the best variant, with the first seed."""
    names = [row.variant for row in rows if not math.isnan(row.mean)][:2]
    found = {
        one.variant: runner.out / one.run
        for one in runner.results
        if one.seed == 0 and not one.failure and one.variant in names
    }
    return [found[name] for name in names if name in found]


def _facts() -> dict[str, Any]:
    """What the figures depend on, for the JSON file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(usable_cores()),
        "gpu": gpu,
        "driver": driver() if gpu else None,
        "versions": installed_versions(),
    }
