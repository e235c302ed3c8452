"""Times training steps part by part, models and feeds by turns: `sdpnet bench step [--data SHARDS]`.

Each row is a model on a feed: fixed noise on the device (`synthetic`), or a pipeline that reads shards. All take the
same recipe, batch and image size, in one process; from round to round the order is turned around, and the first round
does not count. The rate of large matrix products is measured between the rounds: what share of it a step reaches says
what is left to gain.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from pipelines.contract import PIPELINES
from pipelines.errors import UserError, nearest, require, run_command
from pipelines.layout import open_split
from pipelines.machine import commit, cpu_name, driver, installed_versions, usable_cores
from pipelines.publish import publish_bytes
from pipelines.status_line import StatusLine
from sdpnet.bench_step_race import PARTS, SYNTHETIC, Entry, Race, run_race
from sdpnet.config import load_config
from sdpnet.flops import TRAINING_FLOPS_PER_MAC
from sdpnet.hardware import Card, StepChoices, choose_step, look_at
from sdpnet.model import MODELS

__all__ = ["MODELS_BY_DEFAULT", "PEERS", "main"]

PEERS: Final = ("vit_base_patch16_224", "convmixer_1024_20_ks9_p14", "convnext_base")  # timm's
MODELS_BY_DEFAULT: Final = ("sdpnet_l", "sdpnet_xl", "sdpnet_xxl", *PEERS)
FEEDS: Final = tuple(name for name in PIPELINES if name != SYNTHETIC)
_NOTE: Final = (
    "Images/s are of each round. Parts are ms a step: of the GPU's own time between events, of the wall clock on "
    "CPUs; the GPU's data wait is the time without a complete batch. Copy: of one batch from pinned memory, by "
    "itself. Share of matmul: 6 FLOP for each multiply-accumulate of the forward pass, by the rate of large "
    "matrix products in the step's dtype, measured between the rounds. Peak memory: torch's, of this model alone;"
    " a pipeline's own is not in it."
)


def _share(race: Race, entry: Entry) -> float:
    """Of the matrix products' rate that the model's arithmetic reaches, the median over rounds."""
    flops = TRAINING_FLOPS_PER_MAC * entry.macs
    return statistics.median(
        rate * flops / matmul for rate, matmul in zip(entry.rates, race.matmul_rates, strict=False)
    )


def _tables(race: Race, title: str) -> list[Table]:
    """Rates, and parts of a step."""
    tables = []
    for heading, columns in ((title, ("images/s", "min..max", "of matmul", "memory")), ("ms of a step", PARTS)):
        table = Table(title=heading, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("", overflow="fold")
        table.add_column("feed", no_wrap=True)
        for name in columns:
            table.add_column("wait" if name == "data wait" else name, justify="right", no_wrap=True)
        tables.append(table)
    for entry in race.entries:
        if entry.reason:
            tables[0].add_row(entry.model, entry.feed, "-")
            continue
        peaks = [round_.peak_bytes for round_ in entry.rounds if round_.peak_bytes is not None]
        tables[0].add_row(
            entry.model,
            entry.feed,
            f"{statistics.median(entry.rates):,.0f}",
            f"{min(entry.rates):,.0f}..{max(entry.rates):,.0f}",
            f"{_share(race, entry):.0%}",
            f"{max(peaks) / 1e9:,.1f} GB" if peaks else "",
        )
        parts = (f"{statistics.median(entry.milliseconds(part)):,.1f}" for part in PARTS)
        tables[1].add_row(entry.model, entry.feed, *parts)
    return tables


def _result(race: Race, entry: Entry) -> dict[str, Any]:
    row = {"model": entry.model, "feed": entry.feed}
    if entry.reason:
        return {**row, "not_measured": entry.reason}
    peaks = [round_.peak_bytes for round_ in entry.rounds if round_.peak_bytes is not None]
    parts = {part: entry.milliseconds(part) for part in PARTS}
    return {
        **row,
        "parameters": entry.num_parameters,
        "forward_gmac": round(entry.macs / 1e9, 3),
        "steps": entry.num_steps,
        "images_per_second": [round(rate, 1) for rate in entry.rates],
        "median": round(statistics.median(entry.rates), 1),
        "min": round(min(entry.rates), 1),
        "max": round(max(entry.rates), 1),
        "part_ms": {
            part: {"median": round(statistics.median(ms), 3), "min": round(min(ms), 3), "max": round(max(ms), 3)}
            for part, ms in parts.items()
        },
        "share_of_matmul": round(_share(race, entry), 4),
        "peak_bytes": max(peaks) if peaks else None,
    }


def _report(race: Race, arguments: argparse.Namespace, card: Card, choices: StepChoices) -> dict[str, Any]:
    """The record, as those in records/."""
    now = datetime.datetime.now(datetime.timezone.utc)
    on_gpu = card.capability is not None
    return {
        "date": now.date().isoformat(),
        "what": "Training steps timed part by part, models and feeds by turns in one process",
        "commit": commit(),
        "commands": [f"sdpnet bench step {shlex.join(arguments.argv)}".strip()],
        "hardware": {
            "cpu": cpu_name(),
            "cores": len(usable_cores()),
            "threads": torch.get_num_threads(),
            "gpu": card.name if on_gpu else None,
            "compute_capability": f"{card.capability[0]}.{card.capability[1]}" if card.capability else None,
            "driver": driver(),
        },
        "versions": installed_versions(),
        "note": _NOTE,
        "step": str(choices),
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "matmul_tflops": [round(rate / 1e12, 3) for rate in race.matmul_rates],
        "copy_ms": [round(1000 * seconds, 3) for seconds in race.copy_seconds] or None,
        "results": [_result(race, entry) for entry in race.entries],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdpnet bench step",
        description="Times training steps part by part, models and feeds by turns.",
        epilog=f"Models: {', '.join(MODELS)}, and timm's by their names. Feeds with --data: {', '.join(FEEDS)}.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="NAMES", default=",".join(MODELS_BY_DEFAULT), help="comma-separated (default: %(default)s)")
    add("--data", metavar="SHARDS", help="shard set: real feeds beside the synthetic one")
    add("--pipelines", metavar="NAMES", default="native,dali", help="feeds from --data (default: %(default)s)")
    add("--image-size", metavar="N", type=int, default=224, help="default: %(default)s")
    add("--batch-size", metavar="N", type=int, default=256, help="default: %(default)s")
    add("--rounds", metavar="N", type=int, default=5, help="that count (default: %(default)s)")
    add("--seconds", metavar="S", type=float, default=3.0, help="a round, about (default: %(default)s)")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="default: %(default)s")
    add("--compile", choices=["auto", "yes", "no"], default="auto", help="default: %(default)s")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add("--json", metavar="FILE", type=Path, help="also write the figures here")
    return parser


def _main(arguments: argparse.Namespace) -> int:
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
        raise UserError(f"--json {arguments.json}: its directory is not there")
    feeds, num_classes = [SYNTHETIC], 1000
    settings = [f"data.image_size={arguments.image_size}", f"data.batch_size_per_gpu={arguments.batch_size}"]
    if arguments.data:
        names = list(dict.fromkeys(arguments.pipelines.split(",")))
        if unknown := [name for name in names if name not in FEEDS]:
            raise UserError(f"--pipelines {arguments.pipelines}: no {unknown[0]!r}: {nearest(unknown[0], FEEDS)}")
        feeds += names
        settings.append(f"data.path={arguments.data}")
        manifest, reader = open_split(arguments.data, "train")
        num_classes = max(num_classes, len(manifest.classes))
        most = f"at most {reader.num_samples}, the samples of the split"
        require(arguments.batch_size <= reader.num_samples, "--batch-size", arguments.batch_size, most)
    config = load_config("sdpnet_xl", settings)
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    card = look_at(device)
    compile_: Any = {"auto": "auto", "yes": True, "no": False}[arguments.compile]
    choices = choose_step(card, amp=arguments.amp, compile=compile_)
    console = Console(highlight=False)
    title = f"{card.name}, {arguments.image_size} px, batches of {arguments.batch_size}"
    console.print(f"step: {choices}\n", markup=False, soft_wrap=True)
    with StatusLine() as say:
        race = run_race(
            models,
            feeds,
            config,
            num_classes,
            device,
            choices,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            say=say,
        )
    for table in _tables(race, title):
        console.print(table)
        console.print()
    for entry in race.entries:
        if entry.reason:
            console.print(f"{entry.model}, {entry.feed}: {entry.reason}", markup=False, soft_wrap=True)
    if race.matmul_rates:
        console.print(f"large matrix products: {statistics.median(race.matmul_rates) / 1e12:,.2f} TFLOP/s")
    if race.copy_seconds:
        console.print(f"copying a batch to the GPU, by itself: {1000 * statistics.median(race.copy_seconds):,.2f} ms")
    if arguments.json is not None:
        record = _report(race, arguments, card, choices)
        publish_bytes(arguments.json, (json.dumps(record, indent=1) + "\n").encode())
    return 0 if race.running else 1


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 when nothing could be measured."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    arguments.argv = argv
    return run_command(lambda: _main(arguments))


if __name__ == "__main__":
    sys.exit(main())
