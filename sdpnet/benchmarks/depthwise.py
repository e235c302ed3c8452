"""Times a conv block in each of its variants: `python -m sdpnet.benchmarks.depthwise`.

The variants are torch's, the one with Triton's depthwise convolution, and the one that is a single operation in
training. The input is channels_last and has the shape of SdP-Net XXL at 224 px. The contestants take turns, for each
dtype, and the first round does not count. Without a GPU on which the kernels run, the result is "not measured".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from sdpnet.execution.hardware import amp_dtype
from sdpnet.execution.variants.choice import Measured, race
from sdpnet.execution.variants.conv_block import CANDIDATES, conv_block_variants
from sdpnet.model.kernels.depthwise import runs_on
from sdpnet.model.sdpnet import MODELS
from sdpnet.pipelines.errors import require
from sdpnet.pipelines.machine import commit, driver
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["DTYPES", "add_arguments", "main", "measure", "run"]

DTYPES: Final = ("bf16", "fp16", "fp32")
UNKNOWN: Final = "not measured: no NVIDIA GPU of compute capability 8.0 or more with Triton"


def measure(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """The record: milliseconds of a forward pass, and of forward and backward, by dtype and contestant.

    On a device without the kernels, the record says why there are none.
    """
    options = MODELS["sdpnet_xxl"]
    shape = (batch, options.dim, options.grid_size, options.grid_size)
    record: dict[str, Any] = {
        "input": list(shape),
        "kernel_size": options.kernel_size,
        "rounds": rounds,
        "torch": torch.__version__,
        "commit": commit(),
    }
    if not runs_on(device):
        return {**record, "device": None, "results": UNKNOWN}
    results: dict[str, dict[str, Any]] = {}
    for name in DTYPES:
        dtype, results[name] = amp_dtype(name, device), {}
        for what, backward in (("forward", False), ("forward and backward", True)):
            variants = conv_block_variants(CANDIDATES, shape, options.kernel_size, dtype, device, backward=backward)
            # Products in TF32, which torch's convolutions use, do not agree with float32's.
            measured = race(replace(variants, tolerance=math.inf), device, rounds=rounds)
            results[name][what] = {contestant: _figures(row) for contestant, row in measured.items()}
    gpu = torch.cuda.get_device_name(device)
    return {**record, "device": gpu, "driver": driver(), "cudnn": torch.backends.cudnn.version(), "results": results}


def _figures(measured: Measured) -> dict[str, float] | str:
    """The median and the range, or why there is no time."""
    if measured.reason:
        return measured.reason
    median, least, most = (f(measured.seconds) * 1e3 for f in (statistics.median, min, max))
    return {"median_ms": round(median, 4), "min_ms": round(least, 4), "max_ms": round(most, 4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=256, help="images in a pass (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to this file, not to the terminal")


def run(arguments: argparse.Namespace) -> int:
    require(arguments.batch >= 1, "--batch", arguments.batch, "at least 1")
    require(arguments.rounds >= 1, "--rounds", arguments.rounds, "at least 1")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    text = json.dumps(measure(device, arguments.batch, arguments.rounds), indent=1)
    if arguments.json is None:
        print(text)
    else:
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    return 0


def main(argv: list[str] | None = None, program: str = "python -m sdpnet.benchmarks.depthwise") -> int:
    """The command line; returns the exit status."""
    description = "Times a conv block by torch, with Triton's depthwise convolution, and as one operation."
    return run_alone(program, description, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
