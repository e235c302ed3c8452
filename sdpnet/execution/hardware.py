"""What a training step is made of on a card: its dtype, attention, kernels, whether it is compiled and ever waits."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Final, Literal

import torch

from sdpnet.pipelines.errors import UserError

__all__ = ["Card", "StepChoices", "amp_dtype", "choose_dtype", "choose_step", "look_at"]

_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TRITON: Final = (7, 5)  # the least compute capability that Triton compiles for
_AMPERE: Final = (8, 0)  # the least of torch's FlashAttention; inductor calls cards below it too old for speed


@dataclass(frozen=True)
class Card:
    """What the choices depend on: of a GPU its name, compute capability and whether bf16 is in hardware, and whether
    this installation has Triton and the C compiler that it starts kernels with. `capability` None is a CPU."""

    name: str = "CPU"
    capability: tuple[int, int] | None = None
    has_bf16: bool = False
    has_triton: bool = False
    has_compiler: bool = False


@dataclass(frozen=True)
class StepChoices:
    """How a step is taken.

    dtype: of the forward pass; float16 goes with a gradient scaler.
    attention: which of torch's kernels it takes by itself there.
    triton: the device stage's pixels may come from Triton kernels (`augment.fused`).
    compile: the blocks are compiled.
    asynchronous: the host never waits for the device within a step: the optimizer is fused, and a step that is not
        finite is skipped on the device and reported one step later (see `sdpnet.optim.nonfinite`).
    """

    dtype: torch.dtype
    attention: Literal["flash", "memory-efficient", "CPU"]
    triton: bool
    compile: bool
    asynchronous: bool

    @property
    def scaler(self) -> bool:
        return self.dtype == torch.float16

    def __str__(self) -> str:
        words = [
            f"{str(self.dtype).removeprefix('torch.')}{' with a gradient scaler' if self.scaler else ''}",
            f"{self.attention} attention",
            "Triton kernels" if self.triton else "no Triton kernels",
            "compiled blocks" if self.compile else "not compiled",
            "never waiting for the device" if self.asynchronous else "waiting for the device once a step",
        ]
        return ", ".join(words)


def look_at(device: torch.device) -> Card:
    """The card that `device` is."""
    if device.type != "cuda":
        return Card(has_compiler=_has_compiler())
    with torch.cuda.device(device):
        # is_bf16_supported() alone also says yes to cards (V100) that only emulate it.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Card(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        has_bf16,
        importlib.util.find_spec("triton") is not None,
        _has_compiler(),
    )


@functools.cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def choose_dtype(amp: str, card: Card) -> torch.dtype:
    """The dtype of the forward pass (`train.amp`): bf16 where the card has it in hardware, else fp16, fp32 on CPUs."""
    if amp != "auto":
        return _DTYPES[amp]
    if card.capability is None:
        return torch.float32
    return torch.bfloat16 if card.has_bf16 else torch.float16


def choose_step(card: Card, *, amp: str = "auto", compile: bool | Literal["auto"] = "auto") -> StepChoices:
    """The choices for a card and the keys `train.amp` and `train.compile`.

    What a key asks for is done; `auto` compiles on GPUs from compute capability 8.0 on that have all it takes.

    Raises `UserError` when compiling is asked for and cannot be done.
    """
    dtype, on_gpu, capability = choose_dtype(amp, card), card.capability is not None, card.capability or (0, 0)
    triton = capability >= _TRITON and card.has_triton
    if compile is True and not (card.has_compiler and (triton or not on_gpu)):
        lacks = "a C compiler" if not card.has_compiler else "Triton" if not card.has_triton else "a newer GPU"
        raise UserError(f"train.compile = true: needs {lacks} on this machine; use auto or false")
    flash = capability >= _AMPERE and dtype != torch.float32
    return StepChoices(
        dtype=dtype,
        attention="CPU" if not on_gpu else "flash" if flash else "memory-efficient",
        triton=triton,
        compile=triton and capability >= _AMPERE and card.has_compiler if compile == "auto" else compile,
        asynchronous=on_gpu,
    )


def amp_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass on `device`; see `choose_dtype`."""
    return choose_dtype(choice, look_at(device))
