"""A CUDA stream beside the step's: the next batch is copied and augmented there while the model still works."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

__all__ = ["SideStream"]


class SideStream:
    """Work that is queued within `with side():` runs beside what the current stream has been given; `join` brings its
    results over. On CPUs, where all work is done at once, nothing changes.

    The host runs ahead of the device, so a batch that it takes while the device is at the step before is copied and
    augmented beside that step. The waits are the device's, never the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # what was made before is complete there
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def join(self, *tensors: torch.Tensor) -> None:
        """What the current stream is given from now on comes after all that was queued here. `tensors` were made here
        and are used there: their memory is kept until that is done."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(current)
