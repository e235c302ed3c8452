"""Times pipelines in alternation, on the same shards, cores and crops: `python pipelines/bench.py --data SHARDS`.

Each contestant runs in a process of its own, which is pinned to the cores and has as many threads or workers as cores.
In a round, one contestant at a time delivers batches while all others are idle. The order is reversed from round to
round, and the first round does not count. A round is timed while the pipeline is full, so it includes neither start nor
end. Batches are not used for anything.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import signal
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, Literal

if not __package__:  # run as a file
    from sdpnet import pipelines  # noqa: F401 - from now on, Ctrl-C ends the process with one line

import torch
from rich.console import Console
from rich.table import Table

from sdpnet.pipelines.benchmarks.flags import CEILINGS, add_arguments
from sdpnet.pipelines.benchmarks.peers import PEERS
from sdpnet.pipelines.benchmarks.race import Entry, Race, run_race
from sdpnet.pipelines.benchmarks.worker import Job
from sdpnet.pipelines.errors import UserError, nearest, printable, require
from sdpnet.pipelines.executors.registry import PIPELINES
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.machine import commit, cpu_name, driver, installed_versions, usable_cores
from sdpnet.pipelines.plan import Order, Plan
from sdpnet.pipelines.shards.layout import ShardReader, open_split
from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet
from sdpnet.pipelines.terminal.status_line import StatusLine

__all__ = ["add_arguments", "main", "run"]

CONTESTANTS: Final = (*PIPELINES, *PEERS, *CEILINGS)
MAX_FOREIGN: Final = 0.05  # if other processes take more than this share of the cores' time, figures do not count


def _warm_up_files(reader: ShardReader, batch_size: int, *, train: bool) -> None:
    """Reads the samples of the first batches, so that all contestants find the file equally well cached."""
    order: Order = "random" if train else "sequential"
    plan = Plan(seed=0, sizes=reader.sizes, batch_size=batch_size, image_size=1, order=order)
    for index in range(min(len(plan), 8)):
        for sample in plan.batch_ids(0, index)[0].tolist():
            reader.encoded(sample).max()


def _table(race: Race) -> Table:
    cores, reference = len(race.cores), race.reference
    title = f"{race.image_size} px, {cores} core{'s' if cores > 1 else ''}"
    if reference is not None:
        title += f"; ratio to {reference.contestant}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("images/s", "min..max", "per core", "ratio", "first batch", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in race.entries:
        if entry.reason:
            table.add_row(entry.contestant, "-")
            continue
        assert entry.started is not None
        median = statistics.median(entry.rates)
        peak = max(round_.peak_bytes for round_ in entry.rounds)
        ceiling = entry.contestant in CEILINGS
        table.add_row(
            entry.contestant,
            f"{median:,.0f}",
            f"{min(entry.rates):,.0f}..{max(entry.rates):,.0f}",
            f"{median / cores:,.0f}",
            f"{statistics.median(race.ratios(entry)):.2f}",
            "" if ceiling else f"{entry.started.first_batch_seconds:.2f} s",
            "" if ceiling else f"{peak / 1e6:,.0f} MB",
        )
    return table


def _notes(race: Race) -> list[str]:
    """The remarks below the table, one line each."""
    lines = [f"{entry.contestant}: {entry.reason}" for entry in race.entries if entry.reason]
    for entry in race.running:
        if entry.started is not None and entry.started.crops == "own":
            lines.append(f"{entry.contestant}: own crops of the same distribution, in an order of its own")
        if entry.contestant in CEILINGS:
            lines.append(f"{entry.contestant}: one step alone, {CEILINGS[entry.contestant]}")
    lines += [f"{name}: delivered other samples than the others" for name in race.mismatched()]
    if race.foreign is not None and race.foreign > MAX_FOREIGN:
        lines.append(f"{race.foreign:.0%} of these cores' time went to other processes: these figures do not count")
    return lines


def _report(races: list[Race], arguments: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's record, in the format of those in records/."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.date().isoformat(),
        "what": "Pipelines timed by turns on the same shards, cores and crops",
        "commit": commit(),
        "commands": [f"python pipelines/bench.py {shlex.join(arguments.argv)}"],
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(usable_cores()),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "driver": driver(),
        },
        "versions": installed_versions(),
        "note": "Rates are images/s of each round, their spread min..max; ratios are taken within rounds. First batch: "
        "seconds from making the loader in a fresh process, imports apart, file in memory. Peak memory: VmHWM of the "
        "process and its workers added up, so shared pages and mapped files count in each. Foreign: the share of the "
        "cores' time that other processes and virtual machines took.",
        "mode": arguments.mode,
        "split": arguments.split,
        "device": arguments.device,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "races": [
            {
                "image_size": race.image_size,
                "cores": list(race.cores),
                "foreign": race.foreign,
                "same_samples": not race.mismatched(),
                "ratio_to": race.reference.contestant if race.reference else None,
                "results": [_result(race, entry) for entry in race.entries],
            }
            for race in races
        ],
    }


def _result(race: Race, entry: Entry) -> dict[str, Any]:
    if entry.reason:
        return {"contestant": entry.contestant, "not_measured": entry.reason}
    assert entry.started is not None
    rates, ratios = entry.rates, race.ratios(entry)
    return {
        "contestant": entry.contestant,
        **asdict(entry.started),
        "num_batches": entry.num_batches,
        "images_per_second": [round(rate, 1) for rate in rates],
        "median": round(statistics.median(rates), 1),
        "min": round(min(rates), 1),
        "max": round(max(rates), 1),
        "median_per_core": round(statistics.median(rates) / len(race.cores), 1),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
        "peak_bytes": max(round_.peak_bytes for round_ in entry.rounds),
        "foreign": [round_.foreign for round_ in entry.rounds],
    }


def _numbers(flag: str, text: str, low: int, high: int) -> list[int]:
    numbers = [int(word) if word.strip().isdecimal() else 0 for word in text.split(",")]
    require(all(low <= number <= high for number in numbers), flag, text, f"whole numbers from {low} to {high}")
    return numbers


def _names(text: str, ceilings: bool) -> list[str]:
    names = [*text.split(","), *(("synthetic", *CEILINGS) if ceilings else ())]
    for name in names:
        if name not in CONTESTANTS:
            raise UserError(f"--pipelines {text}: no {name!r}: {nearest(name, CONTESTANTS)}")
    return list(dict.fromkeys(names))


def run(arguments: argparse.Namespace) -> int:
    """Prints a table, and with `--json` writes a record. Returns 1 if nothing could be measured."""
    signal.signal(signal.SIGTERM, _terminate)  # so that the contestants' processes end as well
    names = _names(arguments.pipelines, arguments.ceilings)
    usable = usable_cores()
    all_cores = _numbers("--cores", arguments.cores, 1, len(usable))
    sizes = _numbers("--image-size", arguments.image_size, 8, 4096)
    require(arguments.batch_size >= 1, "--batch-size", arguments.batch_size, "at least 1")
    require(arguments.rounds >= 1, "--rounds", arguments.rounds, "at least 1")
    require(0.01 <= arguments.seconds <= 600, "--seconds", arguments.seconds, "from 0.01 to 600")
    require(arguments.batches >= 0, "--batches", arguments.batches, "at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; sdpnet doctor says why")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    mode: Literal["train", "eval"] = arguments.mode
    batch_size: int = arguments.batch_size
    arguments.split = arguments.split or ("train" if mode == "train" else "val")
    _, reader = open_split(arguments.data, arguments.split)
    if reader.num_samples == 0:
        raise UserError(f"{reader.path}: the split has no samples")
    most = f"at most {reader.num_samples}, the samples of the split"
    require(arguments.batch_size <= reader.num_samples, "--batch-size", arguments.batch_size, most)
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: its directory does not exist")
    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json {arguments.json}: is a directory; give the name of a file")

    console = Console(highlight=False)
    _warm_up_files(reader, batch_size, train=mode == "train")
    races = []
    length = f"{arguments.batches} batches" if arguments.batches else f"{arguments.seconds:g} s"
    console.print(
        f"{printable(arguments.data)}, {printable(arguments.split)}: {mode} crops, "
        f"batches of {arguments.batch_size} on {arguments.device}; "
        f"medians of {arguments.rounds} x {length}; memory is the peak, workers and mapped files included\n",
        markup=False,
        soft_wrap=True,
    )
    try:
        for image_size in sizes:
            for count in all_cores:
                cores = tuple(usable[:count])
                job = Job("", arguments.data, arguments.split, mode, image_size, batch_size, cores, arguments.device)
                jobs = [replace(job, contestant=name) for name in names]
                with StatusLine() as say:
                    race = run_race(
                        jobs, arguments.rounds, seconds=arguments.seconds, num_batches=arguments.batches, say=say
                    )
                races.append(race)
                console.print(_table(race))
                for line in _notes(race):
                    console.print(printable(line), markup=False, soft_wrap=True)
                console.print()
    finally:
        if arguments.json is not None and races:
            publish_bytes(arguments.json, (json.dumps(_report(races, arguments), indent=1) + "\n").encode())
    if not any(race.running for race in races):
        return 1
    if arguments.json is None:
        for line in next_lines(*sdpnet("doctor", "--data", Path(arguments.data))):
            console.print(line, markup=False, soft_wrap=True)
    return 0


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None, program: str = "bench") -> int:
    """Runs the command line. Returns the exit status, which is 1 if nothing could be measured."""
    return run_alone(
        program, "Times pipelines in alternation, on the same shards, cores and crops.", add_arguments, run, argv
    )


if __name__ == "__main__":
    sys.exit(main())
