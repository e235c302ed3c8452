"""Memory for batches on a CPU that is used again when the last tensor on it is gone.

    buffers = Buffers(nbytes, keep=4)
    images = buffers.lend((256, 224, 224, 3), torch.uint8)   # a tensor like any other; valid as long as it is held

Fresh memory is expensive: the system hands out an array of 77 MB page by page, which took 54 ms (records/LOG.md).
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["Buffers"]


class Buffers:
    """Buffers of one size, made when they are needed.

    A tensor from `lend` owns its memory until it and all tensors that share its storage are gone. The buffer then
    returns to this object, or is freed if `keep` buffers are free already.

    Args:
        nbytes: the size of each buffer.
        keep: the number of free buffers that are kept.

    Attributes:
        num_made: the number of buffers made so far.
    """

    def __init__(self, nbytes: int, *, keep: int) -> None:
        self.nbytes = nbytes
        self.keep = keep
        self.num_made = 0
        self._free: deque[np.ndarray] = deque(maxlen=keep)  # appending to a full one drops its oldest buffer

    @property
    def num_free(self) -> int:
        return len(self._free)

    def lend(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of at most `nbytes` bytes, in C order, on a free buffer or on a new one."""
        nbytes = math.prod(shape) * dtype.itemsize
        assert nbytes <= self.nbytes, f"{nbytes} > {self.nbytes}"
        try:
            buffer = self._free.pop()  # the one that was used last, which the caches may still hold
        except IndexError:
            # torch aligns to 64 bytes, numpy to 16.
            buffer = torch.empty(self.nbytes, dtype=torch.uint8).numpy()
            self.num_made += 1
        # torch keeps the array that a tensor was made from until the tensor's storage is freed.
        lent = buffer[:nbytes]
        weakref.finalize(lent, self._free.append, buffer).atexit = False
        return torch.from_numpy(lent).view(dtype).view(*shape)
