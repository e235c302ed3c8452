"""The `native` pipeline, the default: our crop decoder fills reused batches, in threads of this process.

plans -> read-ahead -> jobs under way (`_Depth` and one) -> (CUDA: a copy on its own stream) -> Batch
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sdpnet.pipelines.contract import Batch, Source
from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.native.decoder import Decoder, Job
from sdpnet.pipelines.native.status import Status
from sdpnet.pipelines.plan import BatchPlan, Plan
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["NativeLoader", "make"]

_WORDS = {Status.DAMAGED: "damaged", Status.UNSUPPORTED: "unsupported", Status.TOO_LARGE: "too large a"}
_WAIT_MS = 50  # Ctrl-C is seen between two waits


class _Buffer:
    """One batch of images in this process's memory, pinned when they go on to a GPU."""

    def __init__(self, shape: tuple[int, ...], pinned: bool) -> None:
        self.images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self.copied: torch.cuda.Event | None = None  # once the GPU has them


class _Pool:
    """Buffers of a shape, made when they are needed."""

    def __init__(self, shape: tuple[int, ...], *, pinned: bool) -> None:
        self.shape = shape
        self.pinned = pinned
        self.buffers: list[_Buffer] = []
        self.free: deque[_Buffer] = deque()  # the longest free first

    def take(self, limit: int) -> _Buffer:
        """A free one, or a new one while there are fewer than `limit`: no more are needed at once."""
        ready = self.free and (self.free[0].copied is None or self.free[0].copied.query())
        if not ready and len(self.buffers) < limit:
            self.buffers.append(_Buffer(self.shape, self.pinned))
            return self.buffers[-1]
        buffer = self.free.popleft()
        if buffer.copied is not None:
            buffer.copied.synchronize()
        return buffer


class _Depth:
    """How many batches are decoded ahead of the one that is asked for: between `source`'s first number and its most.

    One more whenever a batch had to be waited for though the threads had nothing to do at some time since the last
    change: then they could have worked further ahead. Threads that are never done need no room.
    """

    def __init__(self, source: Source) -> None:
        self.batches, self._most = source.options.prefetch
        self._rested = False

    def begin(self) -> None:
        """An epoch: its first batch is always waited for."""
        self._rested = False

    def asked(self, *, rested: bool, waited: bool) -> None:
        self._rested |= rested
        if waited and self._rested and self.batches < self._most:
            self.batches += 1
            self._rested = False


class _OnDevice:
    """Two batches of images on the GPU, by turns: one is copied to while the other may still be read.

    They are copied on the stream `copies`, and read on the stream that is current where this is made.
    """

    def __init__(self, shape: tuple[int, ...], copies: torch.cuda.Stream) -> None:
        self._copies, self._reads = copies, torch.cuda.current_stream(copies.device)
        self._images = [torch.empty(shape, dtype=torch.uint8, device=copies.device) for _ in range(2)]
        self._read = [self._reads.record_event() for _ in range(2)]  # at first: who had this memory before is done
        self._turn = 0
        for images in self._images:
            images.record_stream(copies)  # who gets it afterwards waits for the copies too

    def copy(self, buffer: _Buffer) -> torch.Tensor:
        """The buffer's images, complete for what the reading stream does next."""
        self._turn = 1 - self._turn
        images = self._images[self._turn]
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._read[self._turn])
            images.copy_(buffer.images, non_blocking=True)
            buffer.copied = self._copies.record_event()
        self._reads.wait_event(buffer.copied)
        return images

    def has_been_read(self) -> None:
        """All that reads the newest images has been queued."""
        self._read[self._turn] = self._reads.record_event()


@dataclass(frozen=True)
class _Flight:
    """A batch that is being decoded."""

    plan: BatchPlan
    job: Job
    buffer: _Buffer


class NativeLoader:
    """See `sdpnet.pipelines.contract.Loader`. Threads start with the first batch and end with `close`.

    An iterator holds one batch of pixels more than are decoded ahead, for CUDA two, and leaves them to the next; on the
    GPU it has two.
    """

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self.source = source
        self.manifest = manifest
        self.masked: list[int] = []
        self._decoder: Decoder | None = None
        self._depth = _Depth(source)
        self._pool: _Pool | None = None  # while no iterator has it
        self._copies = torch.cuda.Stream(source.device) if source.device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.source.plan)

    def set_plan(self, plan: Plan) -> None:
        self.source = self.source.with_plan(plan)

    def set_image_size(self, image_size: int) -> None:
        self.set_plan(self.source.plan.resized(image_size))

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        source, size, depth = self.source, self.source.plan.image_size, self._depth
        decoder = self._decoder = self._decoder or Decoder(source.threads)
        pool, self._pool, self.masked = self._pool, None, []
        shape = (source.plan.batch_size // source.shard.world_size, size, size, 3)
        if pool is None or pool.shape != shape:
            pool = _Pool(shape, pinned=self._copies is not None)
        there = None if self._copies is None else _OnDevice(shape, self._copies)
        plans = _plans(source, decoder, epoch, start)
        flights: deque[_Flight] = deque()
        depth.begin()
        try:
            while True:
                rested = bool(flights) and flights[-1].job.wait(0)
                while len(flights) <= depth.batches and (plan := next(plans, None)) is not None:
                    buffer = pool.take(depth.batches + (1 if there is None else 2))
                    flights.append(_Flight(plan, _submit(source, decoder, plan, buffer), buffer))
                if not flights:
                    return
                rested = rested and len(flights) > depth.batches  # not merely because the epoch has no more
                depth.asked(rested=rested, waited=not flights[0].job.wait(0))
                while not flights[0].job.wait(_WAIT_MS):
                    pass
                flight = flights.popleft()
                plan = self._outcome(source, flight)
                if there is None:
                    yield source.batch(flight.buffer.images, plan)
                else:
                    yield source.batch(there.copy(flight.buffer), plan)
                    there.has_been_read()
                pool.free.append(flight.buffer)
        finally:
            for flight in flights:
                flight.job.release()
            pool.free = deque(pool.buffers)
            self._pool = pool

    def _outcome(self, source: Source, flight: _Flight) -> BatchPlan:
        """The plan as it could be executed: without the samples that could not be decoded, or that is an error."""
        plan, job = flight.plan, flight.job
        failed = job.statuses != Status.OK
        if failed.any():
            first = int(np.flatnonzero(failed)[0])
            if (job.statuses == Status.NO_MEMORY).any():
                raise MemoryError("no memory left for decoding: lower data.num_workers or data.prefetch_batches")
            source.reader.check(plan.sample_ids)  # else a file that was cut would look like damaged images
            if source.options.on_error == "raise":
                what = _WORDS[Status(job.statuses[first])]
                sample = f"{source.reader.path}: sample {plan.sample_ids[first]}"
                raise ShardError(f"{sample}: {what} JPEG ({job.message(first)})")
            self.masked += plan.sample_ids[failed & plan.valid].tolist()
            plan = plan.mask(failed)
        job.release()
        return plan

    def close(self) -> None:
        """Ends the threads and frees the buffers; another `batches` starts anew."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder, self._pool = None, None


def _plans(source: Source, decoder: Decoder, epoch: int, start: int) -> Iterator[BatchPlan]:
    """The plans from `start` on; the system is asked to read each batch `read_ahead_batches` before it is yielded."""
    ahead: deque[BatchPlan] = deque()
    num_ahead = source.options.native.read_ahead_batches
    following = iter(range(start, len(source.plan)))
    while True:
        for index in itertools.islice(following, min(2, num_ahead + 1 - len(ahead))):
            ahead.append(plan := source.batch_plan(epoch, index))
            if num_ahead:
                ids = plan.sample_ids
                decoder.read_ahead(source.reader.addresses(ids), source.reader.nbytes[ids])
        if not ahead:
            return
        yield ahead.popleft()


def _submit(source: Source, decoder: Decoder, plan: BatchPlan, buffer: _Buffer) -> Job:
    reader, ids = source.reader, plan.sample_ids
    return decoder.submit(
        reader.addresses(ids),
        reader.nbytes[ids],
        reader.sizes[ids],
        np.ascontiguousarray(plan.crop_boxes),
        reader.modes[ids] == MODE_RAW,
        plan.flips,
        buffer.images.numpy(),
    )


def make(source: Source, manifest: Manifest) -> NativeLoader:
    return NativeLoader(source, manifest)
