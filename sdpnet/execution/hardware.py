"""The choices for a training step on a card: dtype, attention, kernels, compilation, and whether the host waits."""

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
_TRITON: Final = (7, 5)  # the lowest compute capability for the kernels of the device stage
_COMPILABLE: Final = (7, 0)  # the lowest that torch's inductor accepts, and that Triton 3.6 and 3.8 compile for
_AMPERE: Final = (
    8,
    0,
)  # the lowest for torch's FlashAttention; inductor warns of older cards as too old for a speed-up


@dataclass(frozen=True)
class Card:
    """The facts that the choices depend on.

    Attributes:
        name: the name of the GPU, or "CPU".
        capability: the compute capability, or None for a CPU.
        has_bf16: whether the GPU computes in bfloat16 in hardware.
        has_triton: whether Triton is installed.
        has_compiler: whether there is a C compiler, with which Triton builds the launchers of its kernels.
    """

    name: str = "CPU"
    capability: tuple[int, int] | None = None
    has_bf16: bool = False
    has_triton: bool = False
    has_compiler: bool = False


@dataclass(frozen=True)
class StepChoices:
    """The choices for a training step.

    Attributes:
        dtype: the dtype of the forward pass. With float16, a gradient scaler is used.
        attention: the attention kernel that torch selects on this card.
        triton: whether the device stage may use Triton kernels (`augment.fused`).
        compile: whether the blocks are compiled.
        asynchronous: whether the host never waits for the device within a step. The optimizer is then fused, and a step
            that is not finite is skipped on the device and reported one step later (see `sdpnet.optim.nonfinite`).
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
    """The facts about `device`."""
    if device.type != "cuda":
        return Card(has_compiler=_has_compiler())
    with torch.cuda.device(device):
        # is_bf16_supported() alone is also True for cards that only emulate bfloat16, such as the V100.
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
    """The dtype of the forward pass for `train.amp`.

    "auto" is bfloat16 on GPUs that have it in hardware, float16 on other GPUs and float32 on CPUs.
    """
    if amp != "auto":
        return _DTYPES[amp]
    if card.capability is None:
        return torch.float32
    return torch.bfloat16 if card.has_bf16 else torch.float16


def choose_step(card: Card, *, amp: str = "auto", compile: bool | Literal["auto"] = "auto") -> StepChoices:
    """The choices for a card and the config keys `train.amp` and `train.compile`.

    `compile="auto"` compiles on GPUs of compute capability 8.0 or more if Triton and a C compiler are installed, and
    `compile=True` from 7.0 on.

    Raises:
        UserError: `compile` is True on a machine that cannot compile.
    """
    dtype, on_gpu, capability = choose_dtype(amp, card), card.capability is not None, card.capability or (0, 0)
    triton = capability >= _TRITON and card.has_triton
    compilable = capability >= _COMPILABLE and card.has_triton
    if compile is True and not (card.has_compiler and (compilable or not on_gpu)):
        newer = "a GPU of compute capability 7.0 or more"
        lacks = "a C compiler" if not card.has_compiler else "Triton" if not card.has_triton else newer
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
