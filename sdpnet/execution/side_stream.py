"""A second CUDA stream, on which the next batch is copied and augmented while the model still computes."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

__all__ = ["SideStream"]


class SideStream:
    """A stream beside the current one.

    Work that is queued within `with side():` runs in parallel with the work that the current stream already has. `join`
    makes its results available to the current stream. On CPUs, which execute work at once, both do nothing.

    The host runs ahead of the device: it takes the next batch while the device still computes the step before, so the
    batch is copied and augmented during that step. Only the device waits in `join`, never the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:  # tensors that exist already may be used on the side stream
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def join(self, *tensors: torch.Tensor) -> None:
        """Makes later work of the current stream wait for all work that is queued on this stream.

        Args:
            tensors: the tensors that were made on this stream and are used on the current one.
        """
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            # When a tensor is freed, torch gives its memory back to the stream that made it. Without `record_stream`,
            # the next batch could overwrite the memory while the current stream still reads it.
            for tensor in tensors:
                tensor.record_stream(current)
