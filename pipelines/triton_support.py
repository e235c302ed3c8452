"""Whether this project's Triton kernels can run on a device. Triton is optional, as are the modules of kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

__all__ = ["import_kernels", "runs_on"]


def import_kernels(*names: str) -> tuple[ModuleType, ...] | None:
    """The modules of kernels with these names, or None without Triton."""
    try:
        return tuple(importlib.import_module(name) for name in names)
    except ImportError:
        return None


def runs_on(device: torch.device, least_capability: tuple[int, int], kernels: Callable[[], object]) -> bool:
    """Whether it is an NVIDIA GPU of this compute capability or a higher one, and `kernels` returns some.

    Triton is not imported for other devices.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= least_capability and kernels() is not None
