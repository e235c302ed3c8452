"""Times `ImageLoader` against the pipeline that it uses: `python -m sdpnet.benchmarks.loader_speed --data SHARDS`.

    a pair:  what is measured | what it is compared with
    uint8    ImageLoader      | the native pipeline's raw batches
    float    ImageLoader      | the native pipeline and a DeviceStage, called by hand
    views    two views        | one view; crops are counted

The contestants take turns in one process, in another order in each round. Ratios are taken within rounds: of the time
on the clock, and of the processor time, which other processes disturb less. Then the memory of this process is read
after each of several epochs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from rich.console import Console
from rich.table import Table

from sdpnet.loading.image_loader import ImageLoader
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.benchmarks.stream import RepeatedPlan
from sdpnet.pipelines.errors import require
from sdpnet.pipelines.executors.registry import PIPELINES
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.loader import make_loader
from sdpnet.pipelines.machine import commit, cpu_name, installed_versions, usable_cores
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["PAIRS", "Contestant", "add_arguments", "main", "memory_of_epochs", "race", "run"]

WARM_UP: Final = 2  # batches of a round that do not count
MEMORY_PREFETCH: Final = 3  # for the memory alone; "auto" may go up to 8 batches and keep their memory
# what is measured -> what it is compared with
PAIRS: Final = {
    "ImageLoader, uint8": "pipeline",
    "ImageLoader": "pipeline and stage",
    "ImageLoader, 2 views": "ImageLoader",
}
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class _Setting:
    """What all contestants have in common."""

    data: str
    split: str
    pipeline: Literal["auto", "native", "torchvision", "ffcv", "dali", "synthetic"]
    image_size: int
    batch_size: int
    workers: int
    augment: str

    @property
    def options(self) -> DataOptions:
        return DataOptions(
            path=self.data,
            pipeline=self.pipeline,
            train_split=self.split,
            image_size=self.image_size,
            batch_size_per_gpu=self.batch_size,
            num_workers=self.workers,
        )

    def loader(self, **options: Any) -> ImageLoader:
        common: dict[str, Any] = {"augment": self.augment, "crop": self.options.crop, "device": "cpu", "seed": 0}
        return ImageLoader(
            self.data,
            self.split,
            train=True,
            pipeline=self.pipeline,
            image_size=self.image_size,
            batch_size=self.batch_size,
            num_workers=self.workers,
            **{**common, **options},
        )


@dataclass
class Contestant:
    """A way to take batches.

    Attributes:
        crops: the number of crops in a batch.
        batches: returns an iterator over a given number of batches.
        seconds: the time on the clock for each batch, of each round that counts.
        processor_seconds: the same of this process's processor time.
    """

    crops: int
    batches: Callable[[int], Iterator[object]]
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def take(self, count: int) -> tuple[float, float]:
        """The time on the clock and the processor time for each of `count` batches, after `WARM_UP` others."""
        batches = self.batches(count + WARM_UP)
        for _ in range(WARM_UP):
            batch = next(batches)
        began, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            batch = next(batches)
        result = (time.perf_counter() - began) / count, (time.process_time() - used) / count
        del batch, batches
        return result


def _contestants(setting: _Setting, stack: contextlib.ExitStack, count: int) -> dict[str, Contestant]:
    """All contestants, for rounds of `count` batches. Their loaders are closed by `stack`.

    Two views need an epoch that is long enough, because a loader of views takes no other plan.
    """
    options, crops = setting.options, setting.batch_size
    extra = options.prefetch[1] + 3  # batches that are still decoded during the last ones that count
    with_augment = setting.loader()
    stage: DeviceStage = with_augment.stage
    augment: AugmentOptions = stage.options
    raw = make_loader(options, AugmentOptions(), "train", ShardOptions(), _CPU, seed=0)
    by_hand = make_loader(options, augment, "train", ShardOptions(), _CPU, seed=0)
    own_stage = DeviceStage(augment, raw.manifest.num_classes, torch.float32, train=True)
    for loader in (raw, by_hand):
        stack.callback(loader.close)
    levels, views = setting.loader(augment="none", dtype=torch.uint8), setting.loader(views=2)
    for made in (with_augment, levels, views):
        stack.callback(made.close)
    plan_by_hand = by_hand.source.plan

    def repeated(loader: Any, plan: Any) -> Callable[[int], Iterator[object]]:
        """Batches of a split that may be smaller than what is measured."""

        def batches(count: int) -> Iterator[object]:
            loader.set_plan(RepeatedPlan(plan, count + extra))
            if not isinstance(loader, ImageLoader):
                return loader.batches()
            loader.set_epoch(0)
            return iter(loader)

        return batches

    def finished(count: int) -> Generator[object, None, None]:
        batches = repeated(by_hand, plan_by_hand)(count)
        while True:
            yield own_stage(next(batches))  # type: ignore[arg-type]

    found = {
        "pipeline": Contestant(crops, repeated(raw, raw.source.plan)),
        "ImageLoader, uint8": Contestant(crops, repeated(levels, levels.source.plan)),
        "pipeline and stage": Contestant(crops, finished),
        "ImageLoader": Contestant(crops, repeated(with_augment, with_augment.source.plan)),
    }
    if len(views) >= count + WARM_UP:
        found["ImageLoader, 2 views"] = Contestant(2 * crops, lambda count: iter(views))
    return found


def race(contestants: dict[str, Contestant], rounds: int, count: int, say: Callable[[str], None]) -> None:
    """Lets all contestants take `count` batches in each round. The first round does not count."""
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(contestants), len(contestants)):
            say(f"{f'round {number} of {rounds}' if number else 'warm-up'}: {name}")
            seconds, processor_seconds = contestants[name].take(count)
            if number:
                contestants[name].seconds.append(seconds)
                contestants[name].processor_seconds.append(processor_seconds)


def memory_of_epochs(loader: ImageLoader, epochs: int) -> list[dict[str, int]]:
    """The memory of this process after each epoch of a loader, in bytes.

    `anonymous` is memory of its own, `resident` also counts the parts of mapped files that are in memory.
    """
    found = []
    for _ in range(epochs):
        for _ in loader:
            pass
        gc.collect()
        status = Path("/proc/self/status").read_text()
        anonymous, resident = (
            1024 * int(match.group(1)) if (match := re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)) else 0
            for key in ("RssAnon", "VmRSS")
        )
        found.append({"anonymous": anonymous, "resident": resident})
    return found


def _ratios(mine: Contestant, theirs: Contestant, what: str) -> dict[str, float]:
    """How many times as many crops a second `mine` makes as `theirs`, within rounds."""
    both = zip(getattr(mine, what), getattr(theirs, what), strict=True)
    values = [other / own * mine.crops / theirs.crops for own, other in both]
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def _rates(contestant: Contestant) -> dict[str, Any]:
    """Crops a second, round by round."""
    rates = [round(contestant.crops / seconds, 1) for seconds in contestant.seconds]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates), "rounds": rates}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, help="shard set")
    add("--split", default="train", help="(default: %(default)s)")
    add("--pipeline", choices=["auto", *PIPELINES], default="native", help="(default: %(default)s)")
    add("--augment", default="sdpnet_xl", help="recipe of the augmentations of float images (default: %(default)s)")
    add("--image-size", type=int, default=224, metavar="N", help="pixels a side (default: %(default)s)")
    add("--batch-size", type=int, default=256, metavar="N", help="images in a batch (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="decoding threads (default: one per core)")
    add("--rounds", type=int, default=9, metavar="N", help="number of measured rounds (default: %(default)s)")
    add("--batches", type=int, default=8, metavar="N", help="batches in a round (default: %(default)s)")
    add("--epochs", type=int, default=10, metavar="N", help="epochs for the memory (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the record to this file")


def run(arguments: argparse.Namespace) -> int:
    for name in ("rounds", "batches", "epochs"):
        require(getattr(arguments, name) >= 1, f"--{name}", getattr(arguments, name), "at least 1")
    setting = _Setting(
        data=arguments.data,
        split=arguments.split,
        pipeline=arguments.pipeline,
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        augment=arguments.augment,
    )
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        contestants = _contestants(setting, stack, arguments.batches)
        race(contestants, arguments.rounds, arguments.batches, lambda line: print(line, file=sys.stderr, flush=True))
    ratios = {
        name: {"to": other} | {what: _ratios(contestants[name], contestants[other], what) for what in _TIMES}
        for name, other in PAIRS.items()
        if name in contestants
    }
    rates = {name: _rates(contestant) for name, contestant in contestants.items()}
    del contestants
    gc.collect()
    with setting.loader(prefetch_batches=MEMORY_PREFETCH) as loader:
        num_images = loader.num_samples
        memory = memory_of_epochs(loader, arguments.epochs)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "what": "ImageLoader against the pipeline that it uses, by turns in one run; its memory over several epochs",
        "commit": commit(),
        "commands": [f"python -m sdpnet.benchmarks.loader_speed {shlex.join(arguments.argv)}"],
        "hardware": {"cpu": cpu_name(), "cores": len(usable_cores())},
        "versions": installed_versions(),
        "num_images": num_images,
        "settings": {key: getattr(arguments, key) for key in ("pipeline", "augment", "image_size", "batch_size")},
        "rounds": arguments.rounds,
        "batches_in_a_round": arguments.batches,
        "torch_threads": torch.get_num_threads(),
        "crops_per_second": rates,
        "ratios": ratios,
        "memory_prefetch_batches": MEMORY_PREFETCH,
        "memory": memory,
    }
    return _report(console, arguments.json, record)


_TIMES: Final = ("seconds", "processor_seconds")


def _report(console: Console, path: Path | None, record: dict[str, Any]) -> int:
    table = Table(
        title="crops a second, as a ratio", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for heading in ("", "compared with", "clock", "min..max", "processor", "min..max"):
        table.add_column(heading, no_wrap=True)
    for name, ratio in record["ratios"].items():
        cells = []
        for what in _TIMES:
            cells += [f"{ratio[what]['median']:.3f}", f"{ratio[what]['min']:.3f}..{ratio[what]['max']:.3f}"]
        table.add_row(name, ratio["to"], *cells)
    console.print(table, "")
    shown = " ".join(f"{epoch['anonymous'] / 1e6:,.0f}" for epoch in record["memory"])
    console.print(f"memory of its own after each epoch, MB: {shown}", soft_wrap=True)
    if path is not None:
        publish_bytes(path, f"{json.dumps(record, indent=1)}\n".encode())
    return 0


def main(argv: list[str] | None = None, program: str = "python -m sdpnet.benchmarks.loader_speed") -> int:
    """The command line; returns the exit status."""
    description = "Times ImageLoader against the pipeline that it uses."
    return run_alone(program, description, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
