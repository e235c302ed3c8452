"""Times the device stage against torchvision's transforms: `python pipelines/benchmarks/augment.py [--json FILE]`.

Each batch gets the seed recipe's RandAugment, normalisation, random erasing and MixUp or CutMix. The order of the
contestants is reversed from round to round, and the first round does not count. A second table compares each operation
alone, drawn by all samples, with torchvision's function for it, called sample by sample.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

if not __package__:  # run as a file
    from sdpnet import pipelines  # noqa: F401 - from now on, Ctrl-C ends the process with one line

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torchvision.transforms.v2 import functional as TF

from sdpnet.pipelines.augment.reference.operations import apply_operations
from sdpnet.pipelines.benchmarks.augment_contestants import (
    CLASSES,
    ROUND,
    SEED,
    Contestant,
    PerSample,
    in_processes,
    in_threads,
    make_images,
    policies,
    race,
)
from sdpnet.pipelines.benchmarks.augment_gpu import on_gpu
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.machine import commit, cpu_name, driver, installed_versions, usable_cores
from sdpnet.pipelines.planning.policies import Operation
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["OPERATIONS", "add_arguments", "main", "run"]


Function = Callable[[torch.Tensor], torch.Tensor]
# operation -> (magnitude, torchvision's function of one image, uint8 (3, H, W))
OPERATIONS: Final[dict[Operation, tuple[float, Function]]] = {
    Operation.SHEAR_X: (0.09, lambda i: TF.affine(i, 0.0, [0, 0], 1.0, [5.142764558, 0.0], center=[0.0, 0.0])),
    Operation.SHEAR_Y: (0.09, lambda i: TF.affine(i, 0.0, [0, 0], 1.0, [0.0, 5.142764558], center=[0.0, 0.0])),
    Operation.TRANSLATE_X: (9.0, lambda i: TF.affine(i, 0.0, [9, 0], 1.0, [0.0, 0.0])),
    Operation.TRANSLATE_Y: (9.0, lambda i: TF.affine(i, 0.0, [0, 9], 1.0, [0.0, 0.0])),
    Operation.ROTATE: (9.0, lambda i: TF.rotate(i, 9.0)),
    Operation.BRIGHTNESS: (0.25, lambda i: TF.adjust_brightness(i, 1.25)),
    Operation.COLOUR: (0.25, lambda i: TF.adjust_saturation(i, 1.25)),
    Operation.CONTRAST: (0.25, lambda i: TF.adjust_contrast(i, 1.25)),
    Operation.SHARPNESS: (0.25, lambda i: TF.adjust_sharpness(i, 1.25)),
    Operation.POSTERIZE: (6.0, lambda i: TF.posterize(i, 6)),
    Operation.SOLARIZE: (178.0, lambda i: TF.solarize(i, 178.0)),
    Operation.AUTOCONTRAST: (0.0, TF.autocontrast),
    Operation.EQUALIZE: (0.0, TF.equalize),
    Operation.INVERT: (0.0, TF.invert),
    Operation.GREYSCALE: (0.0, lambda i: TF.rgb_to_grayscale(i, 3)),
    Operation.GAUSSIAN_BLUR: (1.0, lambda i: TF.gaussian_blur(i, [13, 13], [1.0, 1.0])),
}


def _each_operation(images: torch.Tensor, rounds: int) -> dict[str, dict[str, list[float]]]:
    """The seconds per batch of each operation in each round, for our function and for torchvision's."""
    planes = images.permute(0, 3, 1, 2)
    singles = list(planes.contiguous())
    results = {}
    for operation, (magnitude, function) in OPERATIONS.items():
        kinds = np.full((len(images), 1), operation, np.uint8)
        magnitudes = np.full((len(images), 1), magnitude, np.float32)
        pair: dict[str, Contestant] = {
            "sdpnet": lambda _, k=kinds, m=magnitudes: apply_operations(planes, k, m),  # type: ignore[misc]
            "torchvision": lambda _, f=function: [f(image) for image in singles],  # type: ignore[misc]
        }
        results[operation.name.lower()] = race(pair, rounds, 1, images.device)
    return results


def _race_table(title: str, seconds: dict[str, list[float]], batch: int, reference: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("ms a batch", "min..max", "images/s", f"times {reference}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = statistics.median(_ratios(values, seconds[reference]))
        spread = f"{min(values) * 1e3:,.1f}..{max(values) * 1e3:,.1f}"
        table.add_row(name, f"{median * 1e3:,.1f}", spread, f"{batch / median:,.0f}", f"{ratio:.2f}")
    return table


def _ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """How many times as fast `mine` is as `theirs`, round by round."""
    return [other / own for own, other in zip(mine, theirs, strict=True)]


def _operation_table(operations: dict[str, dict[str, list[float]]]) -> Table:
    table = Table(title="each operation alone", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("ms a batch", "torchvision's", "times torchvision"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, both in operations.items():
        ours, theirs = (statistics.median(both[who]) * 1e3 for who in ("sdpnet", "torchvision"))
        ratio = statistics.median(_ratios(both["sdpnet"], both["torchvision"]))
        table.add_row(name, f"{ours:,.1f}", f"{theirs:,.1f}", f"{ratio:.2f}")
    return table


def _figures(seconds: dict[str, list[float]], reference: str) -> list[dict[str, Any]]:
    return [
        {
            "contestant": name,
            "ms_per_batch": [round(value * 1e3, 2) for value in values],
            "median_ms": round(statistics.median(values) * 1e3, 2),
            "min_ms": round(min(values) * 1e3, 2),
            "max_ms": round(max(values) * 1e3, 2),
            f"median_times_{reference.split(',')[0]}": round(statistics.median(_ratios(values, seconds[reference])), 3),
        }
        for name, values in seconds.items()
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", metavar="N", type=int, default=128, help="default: %(default)s")
    add("--size", metavar="N", type=int, default=224, help="pixels a side (default: %(default)s)")
    add("--rounds", metavar="N", type=int, default=5, help="number of measured rounds (default: %(default)s)")
    add("--threads", metavar="N", type=int, default=len(usable_cores()), help="default: one per core")
    add("--json", metavar="FILE", type=Path, help="also write the figures here")


def run(arguments: argparse.Namespace) -> int:
    batch, size, threads, rounds = arguments.batch, arguments.size, arguments.threads, arguments.rounds
    require(batch >= 2 and batch % 2 == 0, "--batch", batch, "even, at least 2")
    require(8 <= size <= 4096, "--size", size, "from 8 to 4096 pixels")
    require(rounds >= 1, "--rounds", rounds, "at least 1")
    require(1 <= threads <= 1024, "--threads", threads, "from 1 to 1024")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: its directory does not exist")
    torch.set_num_threads(threads)
    images, labels = make_images(batch, size), torch.arange(batch) % CLASSES
    peer = PerSample(SEED, images.permute(0, 3, 1, 2).contiguous(), labels, CLASSES)
    console = Console(highlight=False)
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {
            **policies(images, torch.float32, "auto"),
            "torchvision, loop": peer,
            "torchvision, threads": stack.enter_context(in_threads(peer, threads)),
            "torchvision, processes": in_processes(peer, threads, ROUND),
        }
        seconds = race(contestants, rounds, ROUND, torch.device("cpu"))
    del contestants
    peers = [name for name in seconds if name.startswith("torchvision")]
    best = min(peers, key=lambda name: statistics.median(seconds[name]))
    title = (
        f"{batch} images of {size} px, {threads} thread{'s' if threads > 1 else ''}; torchvision at its best: {best}"
    )
    console.print(_race_table(title, seconds, batch, best), "")
    operations = _each_operation(images, rounds)
    console.print(_operation_table(operations), "")
    gpu: dict[str, Any] | str = "not measured: torch sees no CUDA device"
    if torch.cuda.is_available():
        gpu = on_gpu(batch, size, rounds)
        console.print(_race_table(gpu["device"], gpu["seconds_per_batch"], batch, "torchvision, loop"))
        if "times_copy" in gpu:
            rate, least = gpu["copy_bytes_per_second"], gpu["times_copy"]
            console.print(f"fused, no statistics: {least:.2f} times a copy's time, at {rate / 1e9:,.0f} GB/s")
    else:
        for name in ("fused", "reference", "torchvision on the GPU", "kornia", "times a copy's time"):
            console.print(f"{name}: {gpu}", soft_wrap=True)
    if arguments.json is not None:
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "what": "The device stage against torchvision's transforms sample by sample, by turns in one run",
            "commit": commit(),
            "commands": [f"python pipelines/benchmarks/augment.py {shlex.join(arguments.argv)}"],
            "hardware": {"cpu": cpu_name(), "cores": len(usable_cores()), "driver": driver()},
            "versions": installed_versions(),
            "batch_size": batch,
            "image_size": size,
            "threads": threads,
            "rounds": rounds,
            "best_per_sample": best,
            "stage": _figures(seconds, best),
            "operations": {name: _figures(both, "torchvision") for name, both in operations.items()},
            "gpu": gpu,
        }
        publish_bytes(arguments.json, (json.dumps(record, indent=1) + "\n").encode())
    return 0


def main(argv: list[str] | None = None, program: str = "augment") -> int:
    """Runs the command line. Returns the exit status."""
    return run_alone(program, "Times the device stage against torchvision's transforms.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
