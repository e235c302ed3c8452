"""The `native` pipeline, the default: our crop decoder fills reused batches, in threads of this process.

plans -> read-ahead -> jobs under way (prefetch_batches and one) -> (CUDA: a copy on its own stream) -> Batch
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.beton_reader import MODE_RAW
from pipelines.contract import Batch, Source
from pipelines.errors import ShardError
from pipelines.layout import Manifest
from pipelines.native_decoder import DAMAGED, NO_MEMORY, OK, TOO_LARGE, UNSUPPORTED, Decoder, Job
from pipelines.plan import BatchPlan

__all__ = ["NativeLoader", "make"]

_WORDS = {DAMAGED: "damaged", UNSUPPORTED: "unsupported", TOO_LARGE: "too large a"}
_WAIT_MS = 50  # Ctrl-C is seen between two waits


class _Buffer:
    """One batch of images in this process's memory, pinned when they go on to a GPU."""

    def __init__(self, shape: tuple[int, ...], pinned: bool) -> None:
        self.images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self.copied: torch.cuda.Event | None = None  # once the GPU has them


class _Pool:
    """At most `limit` buffers, made when they are needed."""

    def __init__(self, shape: tuple[int, ...], limit: int, pinned: bool) -> None:
        self.shape = shape
        self.limit = limit
        self.pinned = pinned
        self.buffers: list[_Buffer] = []
        self.free: deque[_Buffer] = deque()  # the longest free first

    def take(self) -> _Buffer:
        ready = self.free and (self.free[0].copied is None or self.free[0].copied.query())
        if not ready and len(self.buffers) < self.limit:
            self.buffers.append(_Buffer(self.shape, self.pinned))
            return self.buffers[-1]
        buffer = self.free.popleft()
        if buffer.copied is not None:
            buffer.copied.synchronize()
        return buffer


@dataclass(frozen=True)
class _Flight:
    """A batch that is being decoded."""

    plan: BatchPlan
    job: Job
    buffer: _Buffer


class NativeLoader:
    """See `pipelines.contract.Loader`. Threads start with the first batch and end with `close`.

    An iterator holds at most `prefetch_batches` + 1 batches of pixels, for CUDA one more, and leaves them to the next.
    """

    def __init__(self, source: Source, manifest: Manifest) -> None:
        self.source = source
        self.manifest = manifest
        self.masked: list[int] = []
        self._decoder: Decoder | None = None
        self._pool: _Pool | None = None  # while no iterator has it
        self._copies = torch.cuda.Stream(source.device) if source.device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.source.plan)

    def set_image_size(self, image_size: int) -> None:
        self.source = self.source.resized(image_size)

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        source, size = self.source, self.source.plan.image_size
        decoder = self._decoder = self._decoder or Decoder(source.threads)
        pool, self._pool, self.masked = self._pool, None, []
        shape = (source.plan.batch_size // source.shard.world_size, size, size, 3)
        if pool is None or pool.shape != shape:
            on_gpu = self._copies is not None
            pool = _Pool(shape, source.prefetch_batches + (2 if on_gpu else 1), pinned=on_gpu)
        plans = _plans(source, decoder, epoch, start)
        flights: deque[_Flight] = deque()
        try:
            while True:
                while len(flights) <= source.prefetch_batches and (plan := next(plans, None)) is not None:
                    buffer = pool.take()
                    flights.append(_Flight(plan, _submit(source, decoder, plan, buffer), buffer))
                if not flights:
                    return
                while not flights[0].job.wait(_WAIT_MS):
                    pass
                flight = flights.popleft()
                plan = self._outcome(source, flight)
                images = flight.buffer.images if self._copies is None else self._on_gpu(flight.buffer, self._copies)
                yield source.batch(images, plan)
                pool.free.append(flight.buffer)
        finally:
            for flight in flights:
                flight.job.release()
            pool.free = deque(pool.buffers)
            self._pool = pool

    def _outcome(self, source: Source, flight: _Flight) -> BatchPlan:
        """The plan as it could be executed: without the samples that could not be decoded, or that is an error."""
        plan, job = flight.plan, flight.job
        failed = job.statuses != OK
        if failed.any():
            first = int(np.flatnonzero(failed)[0])
            if (job.statuses == NO_MEMORY).any():
                raise MemoryError("no memory left for decoding: lower data.num_workers or data.prefetch_batches")
            if source.on_error == "raise":
                what = _WORDS[int(job.statuses[first])]
                sample = f"{source.reader.path}: sample {plan.sample_ids[first]}"
                raise ShardError(f"{sample}: {what} JPEG ({job.message(first)})")
            self.masked += plan.sample_ids[failed & plan.valid].tolist()
            plan = plan.mask(failed)
        job.release()
        return plan

    def _on_gpu(self, buffer: _Buffer, copies: torch.cuda.Stream) -> torch.Tensor:
        """A copy of the buffer's images that is complete for what the current stream does next."""
        with torch.cuda.stream(copies):
            images = buffer.images.to(self.source.device, non_blocking=True)
            buffer.copied = copies.record_event()
        current = torch.cuda.current_stream(self.source.device)
        current.wait_event(buffer.copied)
        images.record_stream(current)  # their memory is the other stream's: not reused before this one is done
        return images

    def close(self) -> None:
        """Ends the threads and frees the buffers; another `batches` starts anew."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder, self._pool = None, None


def _plans(source: Source, decoder: Decoder, epoch: int, start: int) -> Iterator[BatchPlan]:
    """The plans from `start` on; the system is asked to read each batch `read_ahead_batches` before it is yielded."""
    ahead: deque[BatchPlan] = deque()
    following = iter(range(start, len(source.plan)))
    while True:
        for index in itertools.islice(following, min(2, source.read_ahead_batches + 1 - len(ahead))):
            ahead.append(plan := source.batch_plan(epoch, index))
            if source.read_ahead_batches:
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
