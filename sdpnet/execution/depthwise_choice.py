"""The choice between torch's and Triton's depthwise convolution: on a GPU, one conv block is timed with both.

Neither is always the faster one. On H200 cards a block took 2.86 ms with torch and 2.33 ms with Triton in one
measurement, and 3.00 ms with torch and 3.33 ms with Triton in another (records/LOG.md, 2026-11-27).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from torch import nn

from sdpnet import __version__
from sdpnet.checkpoints.file import write_atomically
from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes, from_main
from sdpnet.execution.compiled import compile_blocks
from sdpnet.model.kernels.depthwise import compiles_for, runs_on
from sdpnet.model.sdpnet import ConvBlock, SdPNet
from sdpnet.pipelines.errors import UserError

__all__ = ["CANDIDATES", "block_seconds", "choose_depthwise", "known_seconds"]

# Name -> (whether the convolution is Triton's, the memory format of the block).
CANDIDATES: Final = {
    "torch channels_last": (False, torch.channels_last),
    "torch contiguous": (False, torch.contiguous_format),
    "triton channels_last": (True, torch.channels_last),
    "triton contiguous": (True, torch.contiguous_format),
}
_ROUNDS: Final = 5
_PASSES: Final = 3  # passes that are timed together, so that the host runs ahead of the GPU as it does in training
_MOST_IMAGES: Final = 256  # with more images, the time is proportional to their number


def choose_depthwise(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Sets `triton` of the conv blocks as `train.depthwise` says. Every process must call it.

    `auto` chooses the faster one in the memory formats that `train.memory_format` allows: the main process times
    forward and backward passes of a conv block of the model's shape on its GPU. Where the kernels cannot run, and on
    GPUs of compute capability below 8.0, on which they have never been run, `auto` chooses torch. The state of torch's
    generators does not change.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: `triton` is asked for where the kernels cannot run.
    """
    device, notes = processes.device, []
    chosen = options.depthwise == "triton"
    if chosen and not (runs_on(device) or compiles_for(device)):
        raise UserError(
            "train.depthwise = 'triton': needs Triton and an NVIDIA GPU of compute capability 7.0 or more; "
            "use auto or torch"
        )
    if options.depthwise == "auto" and len(model.conv_blocks) and runs_on(device):
        if processes.is_main:
            shape = (min(batch_size, _MOST_IMAGES), model.options.dim, *[image_size // model.options.patch_size] * 2)
            kernel_size = model.options.kernel_size
            seconds = known_seconds(shape, kernel_size, dtype, device, compiled=options.compile is True)
            chosen = _faster(seconds, options.memory_format)
            times = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in seconds.items())
            notes.append(f"depthwise convolutions: {'triton' if chosen else 'torch'}; a block takes: {times}")
        chosen = bool(from_main(int(chosen), processes))
    for block in model.conv_blocks:
        assert isinstance(block, ConvBlock)
        block.triton = chosen
    return notes


def _faster(seconds: dict[str, float], memory_format: str) -> bool:
    """Whether Triton's convolution is the faster one in a memory format; with `probe`, each in its better format."""
    shortest = {
        triton: min(
            value
            for name, value in seconds.items()
            if CANDIDATES[name][0] == triton and (memory_format == "probe" or name.endswith(f" {memory_format}"))
        )
        for triton in (False, True)
    }
    return shortest[True] < shortest[False]


def known_seconds(
    shape: tuple[int, ...], kernel_size: int, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> dict[str, float]:
    """The median seconds of each of `CANDIDATES`, from a file in the user's cache directory.

    Times that are not in the file are measured and added to it. Without a readable and writable file they are measured
    each time.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "sdpnet" / "depthwise.json"
    what = f"{dtype}, {shape}, kernel {kernel_size}{', compiled' if compiled else ''}"
    key = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, sdpnet {__version__}, {what}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        seconds = {name: float(known[key][name]) for name in CANDIDATES}
    except (OSError, ValueError, TypeError, KeyError):
        measured = block_seconds(shape, kernel_size, dtype, device, compiled=compiled)
        seconds = {name: statistics.median(values) for name, values in measured.items()}
        _keep(path, key, seconds)
    return seconds


def _keep(path: Path, key: str, seconds: dict[str, float]) -> None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    others = known if isinstance(known, dict) else {}
    text = json.dumps({**others, key: seconds}, indent=1) + "\n"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda to: to.write_text(text, encoding="utf-8"))


def block_seconds(
    shape: tuple[int, ...],
    kernel_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int = _ROUNDS,
    backward: bool = True,
    compiled: bool = False,
) -> dict[str, list[float]]:
    """Times a training pass of a conv block with each of `CANDIDATES`, which take turns.

    Args:
        shape: the shape of the block's input: (B, dim, rows, columns).
        dtype: the dtype of the input. Parameters are float32, with autocast where `dtype` is another one.
        rounds: the number of times that are measured for each candidate.
        backward: whether the backward pass is timed too. Without it the forward pass still saves what a backward pass
            would need.
        compiled: whether the block is compiled.

    Returns:
        Seconds of a pass, by candidate and round.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        block = ConvBlock(shape[1], kernel_size, 0.0).to(device)
        if compiled:
            compile_blocks([block])
        x, gradient = torch.randn(2, *shape, device=device, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(rounds + 1):  # the first round compiles and warms up
        for name, (triton, memory_format) in CANDIDATES.items():
            block.triton = triton
            block.to(memory_format=memory_format)
            images, upstream = (value.contiguous(memory_format=memory_format) for value in (x, gradient))
            images.requires_grad_()
            _wait(device)
            began = time.perf_counter()
            for _ in range(_PASSES):
                _one_pass(block, images, upstream if backward else None, dtype)
            _wait(device)
            seconds[name].append((time.perf_counter() - began) / _PASSES)
    if compiled:
        # What torch.compile has recorded about these batch sizes and formats must not affect the training model.
        torch._dynamo.reset()
    return {name: values[1:] for name, values in seconds.items()}


def _one_pass(block: nn.Module, x: torch.Tensor, gradient: torch.Tensor | None, dtype: torch.dtype) -> None:
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        out = block(x)
    if gradient is not None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        out.backward(gradient)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
