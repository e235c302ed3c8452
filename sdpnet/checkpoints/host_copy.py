"""A copy of a training state in host memory that is allocated once and reused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpnet.checkpoints.file import plain_state

__all__ = ["HostCopy"]


class HostCopy:
    """Copies a state's tensors to host memory, which is pinned for tensors of a GPU.

    The call returns the state with the copies in it. They are complete on return and valid until the next call, which
    overwrites the same memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, state: dict[str, Any]) -> dict[str, Any]:
        buffers: dict[tuple[Any, ...], Tensor] = {}
        devices: set[torch.device] = set()

        # A save blocks training only while the state is copied, so the copy must be fast: buffers of the last call are
        # reused where shape and dtype agree, and all copies are queued before the first wait for the device.

        def copy(tensor: Tensor, where: tuple[Any, ...]) -> Tensor:
            buffer = self._buffers.get(where)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            if tensor.is_cuda:
                devices.add(tensor.device)
            buffers[where] = buffer.copy_(tensor, non_blocking=True)
            return buffer

        copied = plain_state(state, copy)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = buffers
        return copied
