"""The `dali` pipeline: NVIDIA DALI decodes the shard's bytes, cropping as the plan says.

On a GPU the decoder is DALI's mixed one (nvJPEG, or the card's JPEG unit) and images stay on the device; without a GPU
the same graph runs on the CPU. Encoded bytes, boxes and flips are fed batch by batch, `prefetch_batches` ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import Final

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from sdpnet.pipelines.contract import Batch, Source
from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.plan import BatchPlan, Plan
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.manifest import Manifest

__all__ = ["DaliLoader", "make"]

_MOST_PREALLOCATED: Final = 1 << 30  # bytes on the card


class DaliLoader:
    """See `sdpnet.pipelines.contract.Loader`."""

    masked: tuple[int, ...] = ()

    def __init__(self, source: Source, manifest: Manifest) -> None:
        if (source.reader.modes == MODE_RAW).any():
            raise UserError(
                f"{source.reader.path}: holds raw pixels, which DALI cannot read; "
                "use --pipeline native (the default), torchvision or ffcv"
            )
        self.source = source
        self.manifest = manifest
        self._pipe: Pipeline | None = None
        self._plans: Iterator[BatchPlan] = iter(())  # what DALI asks for next
        self._running: deque[BatchPlan] = deque()  # what it has asked for and not yet given back

    def __len__(self) -> int:
        return len(self.source.plan)

    def set_plan(self, plan: Plan) -> None:
        if plan.image_size != self.source.plan.image_size:
            self.close()  # the size is part of DALI's graph, which the next iterator builds
        self.source = self.source.with_plan(plan)

    def set_image_size(self, image_size: int) -> None:
        self.set_plan(self.source.plan.resized(image_size))

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        if start >= len(self):
            return
        self._plans = (self.source.batch_plan(epoch, index) for index in range(start, len(self)))
        if self._pipe is None:
            self._pipe = self._define()
            self._pipe.build()
        pipe = self._pipe
        on_gpu = self.source.device.type == "cuda"
        pipe.reset()  # it may stand at the end of an earlier epoch, whether or not that was asked for
        try:
            while True:
                try:
                    # Bound to torch's stream, the images are written before and freed after what is queued there.
                    (images,) = pipe.run(torch.cuda.current_stream(self.source.device) if on_gpu else None)
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise self._failure(error) from error
                # DALI keeps the buffer for as long as `images` lives: until the next batch is asked for.
                yield self.source.batch(torch.from_dlpack(images.as_tensor()), self._running.popleft())
        finally:
            if self._running:  # an early exit or an error: what is in flight goes with the pipeline
                self.close()

    def _define(self) -> Pipeline:
        """The graph, for `build`; not even a card is looked for yet."""
        source = self.source
        on_gpu = source.device.type == "cuda"
        size = source.plan.image_size
        batch_size = source.plan.batch_size // source.shard.world_size
        # What the card's JPEG unit takes beforehand is for a batch of the largest image; the CUDA decoder's own 16 MiB
        # of padding a thread are more than an image of 500 pixels a side needs.
        height, width = source.reader.sizes.max(axis=0).tolist()
        if 3 * batch_size * height * width > _MOST_PREALLOCATED:
            height = width = 0
        unit = {
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
        with pipe:
            encoded, start, shape, flip = fn.external_source(
                source=self._feed,
                num_outputs=4,
                batch=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
                ndim=[1, 1, 1, 0],
            )
            images = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axes=[0, 1],
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                **(unit if on_gpu else {}),
            )
            images = fn.resize(images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
            pipe.set_outputs(fn.flip(images, horizontal=flip))
        return pipe

    def _feed(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        plan = next(self._plans)
        self._running.append(plan)
        encoded = [self.source.reader.encoded(sample) for sample in plan.sample_ids]
        starts, shapes = (np.ascontiguousarray(half) for half in np.split(plan.crop_boxes, 2, axis=1))
        return encoded, starts, shapes, plan.flips.astype(np.int32)

    def _failure(self, error: RuntimeError) -> ShardError:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "unknown error")
        samples = sorted(self._running[0].sample_ids.tolist()) if self._running else []
        for plan in self._running:  # a file that was changed is the cause
            self.source.reader.check(plan.sample_ids)
        return ShardError(f"{self.source.reader.path}: DALI could not decode one of the samples {samples}: {reason}")

    def close(self) -> None:
        self._pipe = None
        self._running.clear()


def make(source: Source, manifest: Manifest) -> DaliLoader:
    return DaliLoader(source, manifest)
