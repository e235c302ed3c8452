"""Breaks a training step down into kernels, and these into parts: matrix products, attention, GELU, and so on.

It also says how long the processor takes to start the kernels of a step, and with what. A step cannot take less than
that: with a small model it may be longer than the kernels themselves.

    python -m sdpnet.gpu_checks.programs.kernels --config sdpnet_xl --json FILE

The step is that of `train` with this config, on noise. torch's profiler measures the kernels of a few steps; the rate
of the step is measured before, without the profiler. On a CPU the operators take the place of the kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from sdpnet.benchmarks.throughput import step_on_noise
from sdpnet.config.load import load_config
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.machine import commit
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["OTHER", "Kernel", "add_arguments", "by_part", "launches", "main", "part_of", "run"]

OTHER: Final = "other"
# part -> a pattern of kernels' names (cuBLAS, cuDNN, cutlass, inductor, ATen, ours) and of ATen's operators. The first
# part that matches counts, since a fused kernel does several things: the costly one comes first.
PARTS: Final[dict[str, str]] = {
    "attention": r"flash|fmha|sdpa|attention|softmax",
    "augmentation": r"^(finish|neighbour|count|table)_kernel",
    "depthwise convolutions": r"^convolve_kernel|weight_gradient_kernel|depthwise",
    "optimizer, average, norm": r"^(update|prepare|square_sum)_kernel|multi_tensor_apply|adam|lerp|foreach"
    r"|lpnorm|linalg_vector_norm",
    "matrix products": r"nvjet|gemm|cublas|splitk|::(add|b|badd|_)?mm\b|::matmul|::linear",
    "batch norm": r"batch_?norm|bn_(fw|bw)",
    "layer norm, residual sums": r"layer_?norm",
    "GELU": r"gelu",
    "dropout": r"dropout|bernoulli",
    "patch convolution": r"fprop|dgrad|wgrad|conv|nchwtonhwc|nhwctonchw",
    "copies": r"memcpy|copy|permute|clone|_cat|transpose|::cat|contiguous",
    "memory set to a value": r"memset|::fill_|::zero_|zeros",
}
_LAUNCH: Final = r"^cu(da)?LaunchKernel"
_NO_KERNEL: Final = r"^Optimizer\.|^ProfilerStep|CompiledFxGraph|Torch-Compiled|^CompiledFunction|^autograd::"


@dataclass(frozen=True)
class Kernel:
    """A kernel's milliseconds and its number of launches in one step."""

    name: str
    ms: float
    calls: float


def part_of(name: str) -> str:
    """The part of `PARTS` that a kernel belongs to, or `OTHER`."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def by_part(kernels: Iterable[Kernel]) -> dict[str, dict[str, float]]:
    """Milliseconds, share of all kernels and launches of each part, the longest first."""
    kernels = list(kernels)
    total = sum(kernel.ms for kernel in kernels) or 1.0
    sums: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        row = sums.setdefault(part_of(kernel.name), {"ms": 0.0, "calls": 0.0})
        row["ms"] += kernel.ms
        row["calls"] += kernel.calls
    rows = sorted(sums.items(), key=lambda item: -item[1]["ms"])
    return {
        part: {"ms": round(row["ms"], 3), "share": round(row["ms"] / total, 4), "calls": round(row["calls"], 1)}
        for part, row in rows
    }


def _kernels(events: EventList, on_gpu: bool, steps: int) -> list[Kernel]:
    found = []
    for row in events:
        is_kernel = row.device_type == torch.autograd.DeviceType.CUDA and not getattr(row, "is_user_annotation", False)
        if on_gpu != is_kernel or re.search(_NO_KERNEL, row.key):
            continue
        took = row.self_device_time_total if on_gpu else row.self_cpu_time_total  # microseconds
        if took > 0:
            found.append(Kernel(row.key, took / 1000 / steps, row.count / steps))
    return sorted(found, key=lambda kernel: -kernel.ms)


def _host_calls(events: EventList, steps: int) -> list[Kernel]:
    """The calls of the processor: operators, and functions of CUDA. Their milliseconds are without those they call."""
    calls = [
        Kernel(row.key, row.self_cpu_time_total / 1000 / steps, row.count / steps)
        for row in events
        if row.device_type == torch.autograd.DeviceType.CPU and not row.key.startswith("ProfilerStep")
    ]
    return sorted(calls, key=lambda call: -call.ms)


def launches(calls: Iterable[Kernel]) -> dict[str, float]:
    """The starts of kernels in a step, and the microseconds that the processor spends in one of them."""
    found = [call for call in calls if re.search(_LAUNCH, call.name)]
    count = sum(call.calls for call in found)
    return {"calls": count, "us": round(1000 * sum(call.ms for call in found) / count, 2) if count else 0.0}


def _print_longest(console: Console, found: list[Kernel]) -> None:
    for each in found[:25]:
        console.print(f"{each.ms:9.3f} ms x{each.calls:6.1f}  {each.name[:110]}", markup=False, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", default="sdpnet_xl", help="default: %(default)s")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config")
    add("--batch-size", type=int, default=256, metavar="N", help="default: %(default)s")
    add("--image-size", type=int, default=224, metavar="N", help="default: %(default)s")
    add("--steps", type=int, default=3, metavar="N", help="steps that are profiled (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of the parts and the longest kernels."""
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    began = time.perf_counter()
    settings = [*arguments.settings, f"data.image_size={arguments.image_size}"]
    step, num_images, notes = step_on_noise(load_config(arguments.config, settings), arguments.batch_size, device)

    chosen_after = time.perf_counter() - began
    for line in notes:
        print(line, flush=True)

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    def starts() -> float:
        """The time until the processor has started all kernels of a step, on an idle device."""
        began = time.perf_counter()
        step()
        took = time.perf_counter() - began
        if on_gpu:
            torch.cuda.synchronize(device)
        return took

    steps(6 if on_gpu else 1)
    started_after = time.perf_counter() - began
    print(f"chosen after {chosen_after:.0f} s, compiled after {started_after:.0f} s", flush=True)
    seconds = steps(12 if on_gpu else 1)
    host_seconds = statistics.median(starts() for _ in range(5 if on_gpu else 1))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as measured:
        steps(arguments.steps)
    events = measured.key_averages()
    kernels = _kernels(events, on_gpu, arguments.steps)
    parts = by_part(kernels)
    calls = _host_calls(events, arguments.steps)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "config": arguments.config,
        "settings": arguments.settings,
        "choices": notes,
        "chosen_after_seconds": round(chosen_after, 1),
        "compiled_after_seconds": round(started_after, 1),
        "batch_size": arguments.batch_size,
        "image_size": arguments.image_size,
        "images_per_second": round(num_images / seconds, 1),
        "step_ms": round(1000 * seconds, 2),
        "kernel_ms": round(sum(kernel.ms for kernel in kernels), 2),
        "host_ms": round(1000 * host_seconds, 2),
        "launches": launches(calls),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "parts": parts,
        "kernels": [
            {"name": each.name[:160], "ms": round(each.ms, 3), "calls": each.calls, "part": part_of(each.name)}
            for each in kernels[:40]
        ],
        "host_calls": [{"name": each.name[:160], "ms": round(each.ms, 3), "calls": each.calls} for each in calls[:40]],
    }
    title = (
        f"{arguments.config}: a step of {1000 * seconds:,.1f} ms has {result['kernel_ms']:,.1f} ms of kernels, "
        f"which the processor starts in {result['host_ms']:,.1f} ms"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("part")
    for heading in ("ms", "share", "launches"):
        table.add_column(heading, justify="right")
    for part, row in parts.items():
        table.add_row(part, f"{row['ms']:,.2f}", f"{row['share']:.1%}", f"{row['calls']:,.0f}")
    console = Console(highlight=False)
    console.print(table)
    _print_longest(console, kernels)
    console.print("\nThe processor, under the profiler, which slows it down:")
    _print_longest(console, calls)
    if arguments.json is not None:
        publish_bytes(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_alone("kernels", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
