"""The choice among several ways to compute a part of a step: each is timed on the GPU, and the fastest is kept.

    variants = Variants("train.attention", "bfloat16, (256, 201, 768), 16 heads", {"torch": ..., "triton": ...})
    name, notes = choose(variants, options.attention, processes)

The first variant is PyTorch's own. One that fails, or whose results differ from PyTorch's by more than rounding, is not
chosen. Times are kept in the user's cache directory, so a part of the same shape is timed once for each GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from sdpnet import __version__
from sdpnet.checkpoints.file import write_atomically
from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes, from_main
from sdpnet.pipelines.errors import UserError

__all__ = ["NEEDS_TRITON", "Measured", "Pass", "Variants", "choose", "images_of_pass", "race"]

Pass = Callable[[], Sequence[torch.Tensor]]
NEEDS_TRITON: Final = "needs Triton and an NVIDIA GPU of compute capability 8.0 or more; use auto or torch"
_ROUNDS: Final = 5
_MOST_IMAGES: Final = 256  # with more images, the time is proportional to their number
_PASSES: Final = 3  # passes that are timed together
_CYCLES: Final = 2e9  # of a GPU in a second, at most
_TOLERANCE: Final = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Variants:
    """The ways to compute one part of a step.

    Attributes:
        key: the key of the config that chooses, such as "train.attention".
        what: the dtype and the shapes, in words; times are kept under it.
        make: name -> a function that prepares a variant and returns its pass, which runs forward and backward once and
            returns the results and all gradients, always in the same order. The first one is PyTorch's. All start from
            equal inputs and weights. Preparing raises `UserError` where the variant is not possible.
        tolerance: how far results may be from PyTorch's, see `Measured.difference`; None is rounding's of their dtype.
    """

    key: str
    what: str
    make: Mapping[str, Callable[[], Pass]]
    tolerance: float | None = None


@dataclass
class Measured:
    """The times of one variant.

    Attributes:
        seconds: of a pass, for each round.
        difference: how far its results are from PyTorch's: the largest over all tensors of the norm of the difference
            by the norm of PyTorch's.
        reason: why it cannot be chosen, or "".
    """

    seconds: list[float] = field(default_factory=list)
    difference: float = 0.0
    reason: str = ""


def images_of_pass(options: TrainOptions, batch_size: int) -> int:
    """The number of images in a pass that is timed: those of one pass of training, but not more than needed."""
    return min(batch_size, _MOST_IMAGES, options.micro_batch if type(options.micro_batch) is int else batch_size)


def choose(variants: Variants, asked: str, processes: Processes) -> tuple[str, list[str]]:
    """The name of the variant that `asked` says: "auto" for the fastest on this GPU, or a name.

    Every process must call it, and all get the same answer. On a CPU, "auto" is PyTorch's. The state of torch's
    generators does not change.

    Returns:
        The name, and lines for the user about the choice.

    Raises:
        UserError: the variant that is asked for cannot run here.
    """
    plain = next(iter(variants.make))
    device = processes.device
    if asked != "auto":
        try:
            with _same_generators(device):
                variants.make[asked]()
        except UserError as error:
            raise UserError(f"{variants.key} = {asked!r}: {error}") from None
        return asked, []
    if device.type != "cuda":
        return plain, []
    notes, names, number = [], list(variants.make), 0
    if processes.is_main:
        measured = _known(variants, device)
        if measured is None:
            measured = race(variants, device)
            _keep(variants, device, measured)
        able = [name for name in names if not measured[name].reason]
        best = min(able, key=lambda name: statistics.median(measured[name].seconds)) if able else plain
        number = names.index(best)
        times = ", ".join(_told(name, row) for name, row in measured.items())
        notes.append(f"{variants.key.removeprefix('train.')}: {best}; {times}")
    return names[from_main(number, processes)], notes


def _told(name: str, measured: Measured) -> str:
    if measured.reason:
        return f"{name} is not possible ({measured.reason})"
    return f"{name} {statistics.median(measured.seconds) * 1e3:.2f} ms"


def race(variants: Variants, device: torch.device, *, rounds: int = _ROUNDS) -> dict[str, Measured]:
    """Times a pass of each variant, by turns; compares their results with PyTorch's. The first round does not count."""
    measured = {name: Measured() for name in variants.make}
    with _same_generators(device):
        passes: dict[str, Pass] = {}
        expected: list[torch.Tensor] = []
        for name, make in variants.make.items():
            try:
                passes[name] = make()
                found = [tensor.detach().clone() for tensor in passes[name]()]
                _wait(device)
            except torch.OutOfMemoryError:
                measured[name].reason = "out of GPU memory"
            except Exception as error:  # also what Triton and torch.compile raise, which have no common class
                measured[name].reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            else:
                expected = expected or found
                _compare(measured[name], found, expected, variants.tolerance)
        able = [name for name in passes if not measured[name].reason]
        for number in range(rounds + 1):
            for name in able if number % 2 else reversed(able):
                seconds = _seconds(passes[name], device)
                if number:
                    measured[name].seconds.append(seconds)
    if "torch._dynamo" in sys.modules:
        # What torch.compile has recorded about these passes must not affect the training model.
        torch.compiler.reset()
    return measured


def _compare(
    measured: Measured, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float | None
) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            measured.reason = f"a result has the shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
            return
        norm = theirs.double().norm().clamp(min=1e-30)
        difference = ((ours.double() - theirs.double()).norm() / norm).item()
        measured.difference = max(measured.difference, difference)
        if not difference <= (tolerance or _TOLERANCE.get(theirs.dtype, _TOLERANCE[torch.bfloat16])):
            measured.reason = f"its results differ from PyTorch's by {difference:.1%}"
            return


def _seconds(one_pass: Pass, device: torch.device) -> float:
    """The seconds of one of several passes in a row: on a GPU the device's, on a CPU the wall clock's.

    A training step computes for longer than the host needs to start its kernels, so the host's time does not count
    there. The GPU is kept waiting here until the host has started all passes.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(_PASSES):
            one_pass()
        return (time.perf_counter() - began) / _PASSES
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    one_pass()
    host = time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(round(_CYCLES * (1.5 * host * _PASSES + 1e-3)))
    first.record()
    for _ in range(_PASSES):
        one_pass()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000 / _PASSES


def _same_generators(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sdpnet" / "variants.json"


def _name(variants: Variants, device: torch.device) -> str:
    versions = f"torch {torch.__version__}, sdpnet {__version__}"
    return f"{torch.cuda.get_device_name(device)}, {versions}, {variants.key}, {variants.what}"


def _known(variants: Variants, device: torch.device) -> dict[str, Measured] | None:
    """The times of all variants in the file, or None if one is missing or the file is not readable."""
    try:
        rows = json.loads(_file().read_text(encoding="utf-8"))[_name(variants, device)]
        known = {
            name: Measured(list(map(float, rows[name]["seconds"])), 0.0, str(rows[name]["reason"]))
            for name in variants.make
        }
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return known if all(row.seconds or row.reason for row in known.values()) else None


def _keep(variants: Variants, device: torch.device, measured: Mapping[str, Measured]) -> None:
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    rows = {name: {"seconds": row.seconds, "reason": row.reason} for name, row in measured.items()}
    content = {**(content if isinstance(content, dict) else {}), _name(variants, device): rows}
    text = json.dumps(content, indent=1) + "\n"
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(), lambda to: to.write_text(text, encoding="utf-8"))
