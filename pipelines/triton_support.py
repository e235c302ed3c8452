"""Finds out whether this project's Triton kernels can run on a device. Triton is an optional dependency."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

__all__ = ["import_kernels", "runs_on"]


def import_kernels(*names: str) -> tuple[ModuleType, ...] | None:
    """Imports the kernel modules with these names. Returns None if Triton is not installed."""
    try:
        return tuple(importlib.import_module(name) for name in names)
    except ImportError:
        return None


def runs_on(device: torch.device, min_capability: tuple[int, int], kernels: Callable[[], object]) -> bool:
    """Whether a device can run kernels.

    Args:
        device: the device in question. Triton is not imported unless it is an NVIDIA GPU.
        min_capability: the lowest compute capability, (major, minor), that the kernels support.
        kernels: imports the kernels; its result is None if they cannot be imported.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= min_capability and kernels() is not None
