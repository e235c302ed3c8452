"""The `native` pipeline, the default: our crop decoder fills reusable buffers, in threads of this process.

    plans -> read-ahead -> jobs in progress (`_PrefetchDepth` + 1) -> (CUDA: a copy on its own stream) -> Batch

Decoding in threads of the training process needs no worker processes and no copies between them. On a CPU, a buffer is
used again when nobody holds the batch in it any more, so that a batch stays valid without a copy.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sdpnet.pipelines.contract import Batch, Source
from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.executors.planned import PlannedLoader
from sdpnet.pipelines.memory.buffers import Buffers
from sdpnet.pipelines.native.decoder import Decoder, Job
from sdpnet.pipelines.native.status import Status
from sdpnet.pipelines.plan import BatchPlan
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.index_file import INDEX_AGAIN
from sdpnet.pipelines.shards.layout import sample_name
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["NativeLoader", "make"]

_WORDS = {Status.DAMAGED: "damaged", Status.UNSUPPORTED: "unsupported", Status.TOO_LARGE: "too large a"}
_WAIT_MS = 50  # Python handles Ctrl-C between two waits


class _Buffer:
    """One batch of images in this process's memory, pinned if it is copied to a GPU."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.copied: torch.cuda.Event | None = None  # recorded after the copy to the GPU


# Buffers are reused because fresh memory is expensive; see `sdpnet.pipelines.memory.buffers`.
class _PinnedPool:
    """Pinned buffers of one shape, made when they are needed. One iterator at a time uses them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.buffers: list[_Buffer] = []
        self.free: deque[_Buffer] = deque()  # the one that has been free longest comes first

    def take(self, limit: int) -> _Buffer:
        """Returns a free buffer, or a new one if none is ready and there are fewer than `limit`.

        `limit` is the number of buffers that can be in use at once. The call waits for a buffer whose copy to the GPU
        is still in progress only when all of them exist.
        """
        ready = self.free and (self.free[0].copied is None or self.free[0].copied.query())
        if not ready and len(self.buffers) < limit:
            self.buffers.append(_Buffer(torch.empty(self.shape, dtype=torch.uint8, pin_memory=True)))
            return self.buffers[-1]
        buffer = self.free.popleft()
        if buffer.copied is not None:
            buffer.copied.synchronize()
        return buffer

    def give_back(self, buffer: _Buffer) -> None:
        """Takes a buffer back whose copy to the GPU is queued."""
        self.free.append(buffer)

    def end_iterator(self) -> None:
        """Takes all buffers back."""
        self.free = deque(self.buffers)


class _LentPool:
    """Buffers on a CPU, which are lent to the batches: one returns when nobody holds its images any more.

    Args:
        in_use: the number of buffers that are in use at once, unless batches are kept.
    """

    def __init__(self, shape: tuple[int, ...], in_use: int) -> None:
        self.shape = shape
        self.lender = Buffers(math.prod(shape), keep=in_use)

    def take(self, limit: int) -> _Buffer:
        return _Buffer(self.lender.lend(self.shape, torch.uint8))

    def give_back(self, buffer: _Buffer) -> None:
        """Does nothing, because the batch has the buffer."""

    def end_iterator(self) -> None:
        """Does nothing."""


# More batches ahead help only if steps vary in length. In a benchmark of 120 steps, the share of the ideal rate was
# 0.89, 0.89, 0.90, 0.88 and 0.88 with 1, 2, 3, 5 and 8 batches ahead for even steps, and 0.65, 0.68, 0.76, 0.82 and
# 0.84 for five short steps and a long one. The rule below reached 0.89 and 0.83 (records/LOG.md).
class _PrefetchDepth:
    """The number of batches that are decoded ahead of the one that is asked for.

    It starts at the first number of `DataOptions.prefetch` and grows up to the second. It grows by one when a batch had
    to be waited for although the threads were idle at some time since the last change, because they could then have
    worked further ahead. Threads that are never idle do not need more room.
    """

    def __init__(self, source: Source) -> None:
        self.batches, self._max = source.options.prefetch
        self._idle = False

    def start_epoch(self) -> None:
        """Begins an epoch. Its first batch always has to be waited for, which does not count."""
        self._idle = False

    def update(self, *, idle: bool, waited: bool) -> None:
        """Notes one batch: whether the threads were idle before, and whether it has to be waited for."""
        self._idle |= idle
        if waited and self._idle and self.batches < self._max:
            self.batches += 1
            self._idle = False


class _DeviceBuffers:
    """Two batches of images on the GPU, used in turn: one is copied to while the other may still be read.

    Copies run on the stream `copies`, reads on the stream that is current when the object is made.
    """

    def __init__(self, shape: tuple[int, ...], copies: torch.cuda.Stream) -> None:
        self._copies, self._reads = copies, torch.cuda.current_stream(copies.device)
        self._images = [torch.empty(shape, dtype=torch.uint8, device=copies.device) for _ in range(2)]
        # torch may hand out memory that work queued on the reading stream still uses. A copy therefore waits for the
        # event of its buffer: at first for all work queued so far, later for the last read of the buffer.
        self._read = [self._reads.record_event() for _ in range(2)]
        self._turn = 0
        for images in self._images:
            images.record_stream(copies)  # the memory's next owner waits for the copies too

    def copy(self, buffer: _Buffer) -> torch.Tensor:
        """Copies a buffer's images. They are complete for all work that the reading stream gets after this call."""
        self._turn = 1 - self._turn
        images = self._images[self._turn]
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._read[self._turn])
            images.copy_(buffer.images, non_blocking=True)
            buffer.copied = self._copies.record_event()
        self._reads.wait_event(buffer.copied)
        return images

    def mark_read(self) -> None:
        """Declares that all reads of the newest images have been queued on the reading stream."""
        self._read[self._turn] = self._reads.record_event()


@dataclass(frozen=True)
class _PendingBatch:
    """A batch that is being decoded."""

    plan: BatchPlan
    job: Job
    buffer: _Buffer


class NativeLoader(PlannedLoader):
    """The loader of the `native` pipeline; see `sdpnet.pipelines.contract.Loader`.

    Threads start with the first batch and end with `close`. An iterator holds buffers for the batches that are decoded
    ahead and one more (two more with CUDA, since a batch may still be copied), and two batches on the GPU. The next
    iterator reuses the buffers. On a CPU, each batch that is still held has a buffer, too.
    """

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self.source = source
        self.manifest = manifest
        self.masked: list[int] = []
        self._decoder: Decoder | None = None
        self._depth = _PrefetchDepth(source)
        self._pool: _PinnedPool | _LentPool | None = None  # None while an iterator uses it
        self._copies = torch.cuda.Stream(source.device) if source.device.type == "cuda" else None

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        source, size, depth = self.source, self.source.plan.image_size, self._depth
        decoder = self._decoder = self._decoder or Decoder(source.threads)
        pool, self._pool, self.masked = self._pool, None, []
        shape = (source.plan.batch_size // source.shard.world_size, size, size, 3)
        if pool is None or pool.shape != shape:
            # Beside the batches in progress, a loop holds the batch that it works on while it asks for the next one.
            pool = _LentPool(shape, source.options.prefetch[1] + 2) if self._copies is None else _PinnedPool(shape)
        on_device = None if self._copies is None else _DeviceBuffers(shape, self._copies)
        plans = _plans(source, decoder, epoch, start)
        pending: deque[_PendingBatch] = deque()
        depth.start_epoch()
        try:
            while True:
                idle = bool(pending) and pending[-1].job.wait(0)
                while len(pending) <= depth.batches and (plan := next(plans, None)) is not None:
                    limit = depth.batches + (1 if on_device is None else 2)
                    pending.append(_begin(source, decoder, plan, pool.take(limit)))
                if not pending:
                    return
                idle = idle and len(pending) > depth.batches  # the end of the epoch does not count
                depth.update(idle=idle, waited=not pending[0].job.wait(0))
                while not pending[0].job.wait(_WAIT_MS):
                    pass
                # Nothing in this frame may keep the batch's memory.
                yield self._finish(source, pending.popleft(), pool, on_device)
                if on_device is not None:
                    on_device.mark_read()
        finally:
            for batch in pending:
                batch.job.release()
            pool.end_iterator()
            self._pool = pool

    def _finish(
        self, source: Source, done: _PendingBatch, pool: _PinnedPool | _LentPool, on_device: _DeviceBuffers | None
    ) -> Batch:
        """The batch of a finished job, on the loader's device."""
        plan = self._outcome(source, done)
        images = done.buffer.images if on_device is None else on_device.copy(done.buffer)
        pool.give_back(done.buffer)
        return source.batch(images, plan)

    def _outcome(self, source: Source, done: _PendingBatch) -> BatchPlan:
        """The plan that could be executed: samples that could not be decoded are masked, or raise `ShardError`."""
        plan, job = done.plan, done.job
        failed = job.statuses != Status.OK
        if failed.any():
            first = int(np.flatnonzero(failed)[0])
            if (job.statuses == Status.NO_MEMORY).any():
                raise MemoryError("no memory left for decoding: lower data.num_workers or data.prefetch_batches")
            source.reader.check(plan.sample_ids)  # a file that was cut would look like damaged images
            if (gone := np.flatnonzero(job.statuses == Status.NO_FILE)).size:  # not a damaged image: never masked
                file = source.reader.file_of(int(plan.sample_ids[gone[0]]))
                raise ShardError(f"{file}: {job.message(int(gone[0]))}; {INDEX_AGAIN}")
            if source.options.on_error == "raise":
                what = _WORDS[Status(job.statuses[first])]
                sample = sample_name(source.reader, int(plan.sample_ids[first]))
                raise ShardError(f"{sample}: {what} JPEG ({job.message(first)})")
            self.masked += plan.sample_ids[failed & plan.valid].tolist()
            plan = plan.mask(failed)
        job.release()
        return plan

    def close(self) -> None:
        """Ends the threads and frees the buffers. Calling `batches` again starts new ones."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder, self._pool = None, None


def _plans(source: Source, decoder: Decoder, epoch: int, start: int) -> Iterator[BatchPlan]:
    """Yields the plans from batch `start` on.

    The system is asked to read a batch's files `read_ahead_batches` batches before its plan is yielded.
    """
    ahead: deque[BatchPlan] = deque()
    num_ahead = source.options.native.read_ahead_batches
    following = iter(range(start, len(source.plan)))
    while True:
        # Two plans at most: the lead grows by one batch at a time, so that the first batch does not wait for the plans
        # of all others.
        for index in itertools.islice(following, min(2, num_ahead + 1 - len(ahead))):
            ahead.append(plan := source.batch_plan(epoch, index))
            if num_ahead:
                decoder.read_ahead(*source.reader.places(plan.sample_ids))
        if not ahead:
            return
        yield ahead.popleft()


def _begin(source: Source, decoder: Decoder, plan: BatchPlan, buffer: _Buffer) -> _PendingBatch:
    reader, ids = source.reader, plan.sample_ids
    places = reader.places(ids)
    job = decoder.submit(
        places.addresses,
        places.nbytes,
        reader.sizes[ids],
        np.ascontiguousarray(plan.crop_boxes),
        reader.modes[ids] == MODE_RAW,
        plan.flips,
        buffer.images.numpy(),
        places.files,
    )
    return _PendingBatch(plan, job, buffer)


def make(source: Source, manifest: Manifest) -> NativeLoader:
    return NativeLoader(source, manifest)
