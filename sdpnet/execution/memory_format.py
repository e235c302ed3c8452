"""The memory format of a model. The faster one differs between GPUs and model sizes, so it can be measured."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from sdpnet.distributed.processes import Processes, from_main

__all__ = ["choose_memory_format"]

_FORMATS = (torch.channels_last, torch.contiguous_format)
_ROUNDS = 5


def choose_memory_format(
    choice: str, model: nn.Module, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> torch.memory_format:
    """The memory format for the config key `train.memory_format`. Every process must call it.

    `channels_last` and `contiguous` name a format. `probe` times forward and backward passes on noise in both formats
    by turns; the result of the main process counts for all. Afterwards the gradients, the batch-norm statistics and
    torch's generators are as before; the memory format of the model may have changed.
    """
    if choice != "probe":
        return torch.channels_last if choice == "channels_last" else torch.contiguous_format
    with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
        times = _times(model, batch_size, image_size, dtype, processes.device)
    return _FORMATS[from_main(times.index(min(times)), processes)]


def _times(model: nn.Module, batch_size: int, image_size: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Median seconds of a forward and backward pass in each of `_FORMATS`."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    model.train()
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    seconds: list[list[float]] = [[] for _ in _FORMATS]
    for _ in range(_ROUNDS + 1):  # the first round warms up
        for format_seconds, memory_format in zip(seconds, _FORMATS, strict=True):
            model.to(memory_format=memory_format)
            batch = images.to(memory_format=memory_format)
            _wait(device)
            began = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(batch).float().square().mean()
            loss.backward()
            _wait(device)
            format_seconds.append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    model.train(training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    return [statistics.median(format_seconds[1:]) for format_seconds in seconds]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
