"""The GPU part of `pipelines/benchmarks/augment.py`: fused kernels, reference, peers, and the GPU's copy rate."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sdpnet.pipelines.augment.fused import launch as fused
from sdpnet.pipelines.benchmarks.augment_contestants import (
    CLASSES,
    ROUND,
    SEED,
    Contestant,
    PerSample,
    has_kornia,
    kornia_stage,
    make_images,
    ours,
    policies,
    race,
)

__all__ = ["min_copy_seconds", "on_gpu"]


def _copy_rate(device: torch.device) -> float:
    """The bytes per second that the GPU reads and writes when it copies 1 GiB; the best of 20 copies."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(_device_seconds(lambda: target.copy_(source), device) for _ in range(20))


def _device_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The seconds that the GPU takes for `work`, without the time that the host takes to launch it.

    The GPU is kept waiting until everything is launched.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms, which is longer than the host takes
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def min_copy_seconds(images: torch.Tensor, rate: float) -> float:
    """The seconds to move each byte once, at a rate in bytes per second: reading uint8, writing half precision."""
    return images.numel() * (1 + 2) / rate


def on_gpu(batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Measures on the GPU. Returns the GPU part of the record."""
    device = torch.device("cuda")
    images = make_images(batch, size).to(device)
    labels = torch.arange(batch, device=device) % CLASSES
    planes = images.permute(0, 3, 1, 2).contiguous()
    fast = {f"fused {name}": run for name, run in policies(images, torch.float16, "auto").items()}
    slow: dict[str, Contestant] = {
        "reference sdpnet": ours(replace(SEED, fused="off"), images, torch.float16),
        "torchvision, loop": PerSample(SEED, planes, labels, CLASSES),
    }
    if has_kornia():
        slow["kornia"] = kornia_stage(SEED, planes, labels)
    if not fused.runs_on(device):
        fast = {}
    seconds = race({**fast, **slow}, rounds, ROUND, device)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "seconds_per_batch": seconds}
    if fast:
        rate = _copy_rate(device)
        run = ours(SEED, images, torch.float16, pointwise=True)
        run(ROUND)
        took = [_device_seconds(lambda: run(1), device) for _ in range(10 * rounds)]
        result["copy_bytes_per_second"] = rate
        result["fused_device_seconds"] = took
        result["times_copy"] = statistics.median(took) / min_copy_seconds(images, rate)
    return result
