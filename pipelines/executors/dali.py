"""The `dali` pipeline: NVIDIA DALI decodes, crops, resizes and flips the shard's images as the plan says.

On a GPU, DALI's mixed decoder is used (nvJPEG, or the card's JPEG unit) and images stay on the device. Without a GPU,
the same graph runs on the CPU. Encoded bytes, boxes and flips are fed batch by batch, `prefetch_batches` ahead. Encoded
bytes are never copied by the thread that asks for batches: DALI's threads read them from the mapped files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from sdpnet.pipelines.contract import Batch, Source
from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.executors.planned import PlannedLoader
from sdpnet.pipelines.plan import BatchPlan, Plan
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["DaliLoader", "make"]

_MAX_PREALLOCATED: Final = 1 << 30  # bytes of GPU memory
_TensorList: Any = TensorListCPU  # the stub lacks an argument
_Inputs: TypeAlias = tuple[TensorListCPU, TensorListCPU, TensorListCPU, TensorListCPU]  # see `DaliLoader._feed`


class DaliLoader(PlannedLoader):
    """The loader of the `dali` pipeline; see `sdpnet.pipelines.contract.Loader`.

    Raises `UserError` for shards with raw pixels, which DALI cannot read.
    """

    masked: tuple[int, ...] = ()
    one_iterator = True

    def __init__(self, source: Source, manifest: Manifest) -> None:
        if (source.reader.modes == MODE_RAW).any():
            raise UserError(
                f"{source.reader.path}: holds raw pixels, which DALI cannot read; "
                "use --pipeline native (the default), torchvision or ffcv"
            )
        self.source = source
        self.manifest = manifest
        self._pipe: Pipeline | None = None
        self._refused: ShardError | None = None  # an image that could not be read
        self._plans: Iterator[BatchPlan] = iter(())  # the plans that DALI will ask for
        self._running: deque[BatchPlan] = deque()  # plans that DALI has asked for and not yet returned as batches
        # The newest inputs, which DALI reads in place. DALI holds them too while it needs them. If it were the last to
        # hold them, its threads would wait for the interpreter's lock to free each array, and the caller for them.
        self._fed: deque[_Inputs] = deque(maxlen=source.prefetch_batches + 2)

    def set_plan(self, plan: Plan) -> None:
        if plan.image_size != self.source.plan.image_size:
            self.close()  # the size is part of DALI's graph, so the next iterator builds a new one
        self.source = self.source.with_plan(plan)

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        if start >= len(self):
            return
        self._plans = (self.source.batch_plan(epoch, index) for index in range(start, len(self)))
        if self._pipe is None:
            self._pipe = self._define()
            self._pipe.build()
        pipe = self._pipe
        on_gpu = self.source.device.type == "cuda"
        # If the last batch of an epoch was taken without asking for the end, the pipeline yields nothing in the next
        # epoch unless it is reset.
        pipe.reset()
        try:
            while True:
                try:
                    # DALI works in the order of torch's stream: images are complete before the work that torch queues
                    # next, and their memory is reused after it.
                    (images,) = pipe.run(torch.cuda.current_stream(self.source.device) if on_gpu else None)
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise self._failure(error) from error
                # DALI's dynamic executor, which is the default, uses a buffer again when no tensor on it is left.
                yield self.source.batch(torch.from_dlpack(images.as_tensor()), self._running.popleft())
        finally:
            if self._running:  # an early exit or an error: batches in flight are dropped with the pipeline
                del pipe
                self.close()

    def _define(self) -> Pipeline:
        """Defines DALI's graph. Nothing is built, and no GPU is looked for, before `build`."""
        source = self.source
        on_gpu = source.device.type == "cuda"
        size = source.plan.image_size
        batch_size = source.plan.batch_size // source.shard.world_size
        # The hints make the card's JPEG unit allocate memory for a whole batch of the largest image beforehand, so they
        # are dropped where that would be too much. The CUDA decoder needs none: its 16 MiB of padding per thread are
        # more than an image of 500 pixels a side takes.
        height, width = source.reader.sizes.max(axis=0).tolist()
        if 3 * batch_size * height * width > _MAX_PREALLOCATED:
            height = width = 0
        hw_options = {
            "hw_decoder_load": source.options.dali.hw_decoder_load,
            "preallocate_width_hint": width,
            "preallocate_height_hint": height,
        }
        pipe = Pipeline(
            batch_size=batch_size,
            num_threads=source.threads,
            device_id=(source.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=source.prefetch_batches,
        )
        # A callback, not `feed_input`: with `schedule_run`, that one runs `prefetch_queue_depth` batches at the first
        # call and fails unless all of them were fed. A callback with `pipe.run()` prefetches by itself.
        with pipe:
            encoded, start, shape, flip = fn.external_source(
                source=self._feed,
                num_outputs=4,
                batch=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
                ndim=[1, 1, 1, 0],
                no_copy=True,  # copying took half of the time of a call, and read cold files in the calling thread
            )
            images = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axes=[0, 1],
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                **(hw_options if on_gpu else {}),
            )
            images = fn.resize(images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
            pipe.set_outputs(fn.flip(images, horizontal=flip))
        return pipe

    def _feed(self) -> _Inputs:
        """The inputs of DALI's next batch: encoded images, crop starts, crop shapes and flips.

        Raises `StopIteration`, which ends the epoch for DALI, when there are no more plans.
        """
        plan = next(self._plans)
        self._running.append(plan)
        try:
            encoded = [self.source.reader.encoded(sample) for sample in plan.sample_ids.tolist()]
        except ShardError as error:  # the file of an image in place; DALI would hide the reason in a text
            self._refused = error
            raise
        # DALI would make the same lists from arrays, but in twice the time, because it examines each one in Python.
        images = _TensorList([TensorCPU(image) for image in encoded], contiguous=False)
        starts, shapes = (np.ascontiguousarray(half) for half in np.split(plan.crop_boxes, 2, axis=1))
        flips = plan.flips.astype(np.int32)
        inputs = images, _TensorList(starts), _TensorList(shapes), _TensorList(flips)
        self._fed.append(inputs)
        return inputs

    def _failure(self, error: RuntimeError) -> ShardError:
        if self._refused is not None:
            return self._refused
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "unknown error")
        samples = sorted(self._running[0].sample_ids.tolist()) if self._running else []
        for plan in self._running:  # if a file was changed, that is the cause
            self.source.reader.check(plan.sample_ids)
        remedy = "sdpnet verify --decode names it"
        path = self.source.reader.path
        return ShardError(
            f"{path}: DALI could not decode one of the samples {samples}: {reason.rstrip(': ')}; {remedy}"
        )

    def close(self) -> None:
        self._pipe = None  # DALI's threads have ended after this, so what they read can go
        self._running.clear()
        self._fed.clear()


def make(source: Source, manifest: Manifest) -> DaliLoader:
    return DaliLoader(source, manifest)
