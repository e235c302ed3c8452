"""Micro batches: the parts of a batch whose activations fit into the memory of the GPU.

    size = choose_micro_batch(options.micro_batch, batch_size, model, one_pass, processes)
    for part in parts(batch_size, size):
        loss = loss_function(network(images[part]), targets[part]) * (part.stop - part.start) / batch_size
        loss.backward()

Losses and gradients add up to those of the whole batch. Batch norm sees micro batches: it normalises by the statistics
of one micro batch, and its running averages move once for each.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from sdpnet.distributed.processes import Processes, min_over_processes
from sdpnet.pipelines.errors import UserError

__all__ = ["Fit", "OutOfGpuMemory", "choose_micro_batch", "out_of_memory", "parts", "probe", "training_pass"]

_HEADROOM = 0.05  # the fraction of the GPU's memory that is set aside for fragmentation
# Bytes for each value of a batch that the side stream prepares during the step. torch keeps freed memory for the stream
# that used it, so the device stage cannot reuse the step's. Measured as peak memory of the stage in PyTorch: 20 bytes
# in the stage, 2 as loaded and 4 in use (records/LOG.md, 2026-11-23).
_PREPARED_BYTES = 26


def parts(batch_size: int, micro_batch: int) -> list[slice]:
    """Splits a batch into as few parts as possible, of at most `micro_batch` images each and of nearly equal size."""
    count = math.ceil(batch_size / micro_batch)
    edges = [batch_size * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def choose_micro_batch(
    choice: Literal["auto"] | int | None,
    batch_size: int,
    model: nn.Module,
    one_pass: Callable[[int], None],
    processes: Processes,
) -> int:
    """The number of images in one forward and backward pass. Every process must call it; all get the same answer.

    Args:
        choice: None for the whole batch, a number of images, or "auto" for the number that fits on the GPUs of all
            processes (see `probe`; on a CPU, the whole batch).
        batch_size: see `probe`.
        model: see `probe`.
        one_pass: see `probe`.
    """
    if choice is None:
        return batch_size
    if choice != "auto":
        return min(choice, batch_size)
    on_gpu = processes.device.type == "cuda"
    return min_over_processes(probe(model, one_pass, batch_size).images if on_gpu else batch_size, processes)


def training_pass(
    model: nn.Module,
    loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    image_size: int,
    num_classes: int,
    dtype: torch.dtype,
    beside: int = 0,
) -> Callable[[int], None]:
    """A function that runs one forward and backward pass of training over a given number of blank images.

    Args:
        dtype: the dtype of the forward pass.
        beside: the number of images that are prepared during the pass; memory for them is held meanwhile.
    """
    device = next(model.parameters()).device

    def one_pass(num_images: int) -> None:
        prepared = torch.empty(_PREPARED_BYTES * beside * 3 * image_size**2, dtype=torch.uint8, device=device)
        images = torch.zeros(num_images, 3, image_size, image_size, dtype=dtype, device=device)
        targets = torch.full((num_images, num_classes), 1 / num_classes, device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images.to(memory_format=torch.channels_last))
        loss_function(logits, targets).backward()
        del prepared

    return one_pass


class OutOfGpuMemory(UserError):
    """A step does not fit into the GPU's memory."""


@dataclass(frozen=True)
class Fit:
    """The result of `probe`.

    Attributes:
        images: the largest number of images that was tried and fitted.
        base: the memory in use without a batch, in bytes.
        peak: the peak memory with `images` images, in bytes.
        limit: the memory that this process can use, in bytes.
    """

    images: int
    base: int
    peak: int
    limit: int

    @property
    def estimate(self) -> int:
        """The number of images that should fit, because every image takes the same memory."""
        if self.peak <= self.base:
            return self.images
        return max(self.images, (self.limit - self.base) * self.images // (self.peak - self.base))


def probe(model: nn.Module, one_pass: Callable[[int], None], batch_size: int) -> Fit:
    """Tries `batch_size` images, then half as many, and so on, until they fit into the memory of the GPU.

    Afterwards the model's weights and buffers and torch's generators are as before, and its gradients are None.

    Args:
        model: in training mode; not its DDP wrapper, because the processes may need different numbers of tries.
        one_pass: runs a forward and a backward pass over a number of images, as `training_pass` makes it. It may raise
            `torch.OutOfMemoryError`.

    Raises:
        UserError: a single image does not fit.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    before = [buffer.clone() for buffer in model.buffers()]
    limit, size = 0, 0
    if on_gpu:
        limit = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        # A real step also holds the optimizer's two moments and DDP's buckets, each as large as the parameters. They
        # do not exist yet, so their memory is set aside, together with the headroom.
        size = 3 * sum(p.numel() * p.element_size() for p in model.parameters()) + round(_HEADROOM * limit)
    held: list[torch.Tensor] = []
    try:
        with torch.random.fork_rng([device] if on_gpu else []):
            room = _fits(lambda size: held.append(torch.empty(size, dtype=torch.uint8, device=device)), size)
            if not room or not _fits(one_pass, 1):  # allocates the gradients, which belong to no image
                raise UserError("out of GPU memory with a single image; use a smaller model or data.image_size")
            base = torch.cuda.memory_allocated(device) if on_gpu else 0
            images = batch_size
            while images > 1:
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(device)
                if _fits(one_pass, images):
                    break
                images = math.ceil(images / 2)
            peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
            return Fit(images, base, peak, limit)
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
        model.zero_grad(set_to_none=True)


def _fits(allocate: Callable[[int], None], amount: int) -> bool:
    try:
        allocate(amount)
        return True
    except torch.OutOfMemoryError:
        pass  # after this block, the tensors that the traceback refers to can be freed
    gc.collect()
    torch.cuda.empty_cache()
    return False


def out_of_memory(
    model: nn.Module, one_pass: Callable[[int], None] | None, micro_batch: int, *, batch_size: int
) -> OutOfGpuMemory:
    """The error for a training step that ran out of GPU memory with `micro_batch` images at a time.

    The message says how many images would fit, as `probe` finds it, unless `one_pass` is None. It must be called after
    the `except` block, when nothing refers to the failed step's tensors any more.
    """
    gc.collect()
    torch.cuda.empty_cache()
    what = f"out of GPU memory with {micro_batch} images at a time"
    if one_pass is None:
        return OutOfGpuMemory(
            f"{what}; set train.micro_batch=auto to keep batches of {batch_size}, or lower data.batch_size_per_gpu"
        )
    fit = probe(model, one_pass, micro_batch)
    if fit.images == micro_batch:
        return OutOfGpuMemory(
            f"{what}, though they fit by themselves: see with nvidia-smi whether the GPU is shared, or set "
            f"train.micro_batch={math.ceil(micro_batch / 2)}"
        )
    about = min(fit.estimate, micro_batch - 1)
    more = f", and about {about} should" if about > fit.images else ""
    return OutOfGpuMemory(
        f"{what}: {fit.images} fit{more}; set train.micro_batch=auto to keep batches of {batch_size}, or "
        f"data.batch_size_per_gpu={fit.images}"
    )
