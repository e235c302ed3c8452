"""The `ffcv` pipeline: FFCV's own `Loader` reads the `.beton` file, in the order and with the crops of the plan.

FFCV draws its order and crops itself. Here both come from the plan:

- FFCV's `traversal_order` is replaced after construction, because the constructor's `order=` accepts only FFCV's own.
- FFCV's order consists of slots of a table. A slot has the number of a sample, its box and its flip, so that a sample
  may be in several batches at once. FFCV's compiled code reaches the table by its address: an array that the closure
  captured would be frozen when it is compiled. The table is a ring, filled a few batches ahead of the reader.
- Labels do not come from FFCV, which would look for a slot's label.

FFCV ignores its decoder's return code, so that training on a damaged JPEG would use another image's pixels. Here the
code is kept in the table and becomes a `ShardError`. FFCV trusts every pointer in a file, so the file is validated
before, and FFCV reads exactly that file, through our memory map of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch

_TORCH_THREADS = torch.get_num_threads()

import numba as nb  # noqa: E402
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader as FfcvNativeLoader  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402

from sdpnet.pipelines.contract import Batch, Source  # noqa: E402
from sdpnet.pipelines.errors import ShardError, UserError  # noqa: E402
from sdpnet.pipelines.executors.planned import PlannedLoader  # noqa: E402
from sdpnet.pipelines.memory.buffers import Buffers  # noqa: E402
from sdpnet.pipelines.plan import BatchPlan, Plan  # noqa: E402
from sdpnet.pipelines.shards.beton import MODE_JPEG, BetonReader  # noqa: E402
from sdpnet.pipelines.shards.in_place import InPlaceReader  # noqa: E402
from sdpnet.pipelines.shards.manifest import Manifest  # noqa: E402

torch.set_num_threads(_TORCH_THREADS)  # importing FFCV sets torch's threads to 1

__all__ = ["FfcvLoader", "make"]

_TOP, _LEFT, _HEIGHT, _WIDTH, _FLIP, _STATUS, _SAMPLE = range(7)
_COLUMNS = 7


@nb.extending.intrinsic
def _int64_pointer(typing_context: Any, address: Any) -> Any:
    """Turns an integer address into a pointer for numba's `carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return nb.types.CPointer(nb.types.int64)(nb.types.int64), generate


class _PlannedDecoder(SimpleRGBImageDecoder):
    """Decodes whole images, then crops, resizes by area and flips them as the slots of a table say.

    The steps are FFCV's own functions; only the boxes and flips are the plan's.

    Args:
        image_size: output pixels a side.
        table: int64 (slots, 7): crop top, left, height, width, flip, the decoder's status, which is written, and the
            number of the sample.
    """

    def __init__(self, image_size: int, table: np.ndarray) -> None:
        super().__init__()
        self.image_size = image_size
        self.table = table

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        # Scratch memory per image is sized by the largest JPEG. FFCV's own decoder takes the tallest image's height
        # times the widest one's width. Raw pixels need none: they are resized where they lie in the file.
        jpegs = self.metadata[self.metadata["mode"] == MODE_JPEG]
        largest = int((jpegs["height"].astype(np.int64) * jpegs["width"]).max(initial=1))
        shape = (self.image_size, self.image_size, 3)
        state = State(jit_mode=True, device=previous_state.device, shape=shape, dtype=np.dtype("u1"))
        return state, (AllocationQuery(shape, np.dtype("u1")), AllocationQuery((largest * 3,), np.dtype("u1")))

    def generate_code(self) -> Callable[..., Any]:
        read = self.memory_read
        parallel_range = Compiler.get_iterator()
        decode_jpeg = Compiler.compile(imdecode)
        crop_and_resize = Compiler.compile(resize_crop)
        address, rows, columns, jpeg = self.table.ctypes.data, len(self.table), _COLUMNS, MODE_JPEG

        def decode(batch_indices: Any, storage: Any, metadata: Any, storage_state: Any) -> Any:
            table = nb.carray(_int64_pointer(address), (rows, columns))
            destination, scratch = storage
            for i in parallel_range(len(batch_indices)):
                slot = batch_indices[i]
                field = metadata[table[slot, 6]]
                encoded = read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                pixels = scratch[i]
                if field["mode"] == jpeg:
                    status = decode_jpeg(encoded, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    table[slot, 5] = status
                    image = pixels.reshape(-1)[: 3 * height * width].reshape(height, width, 3)
                else:
                    image = encoded.reshape(height, width, 3)
                top, left = table[slot, 0], table[slot, 1]
                bottom, right = top + table[slot, 2], left + table[slot, 3]
                crop_and_resize(image, top, bottom, left, right, destination[i])
                if table[slot, 4]:
                    size = destination.shape[2]
                    for y in range(destination.shape[1]):
                        for x in range(size // 2):
                            for c in range(3):
                                swap = destination[i, y, x, c]
                                destination[i, y, x, c] = destination[i, y, size - 1 - x, c]
                                destination[i, y, size - 1 - x, c] = swap
            return destination[: len(batch_indices)]

        setattr(decode, "is_parallel", True)  # noqa: B010
        return decode


class _PlannedOrder(TraversalOrder):
    """A traversal order for FFCV that is set from outside before each epoch."""

    order = np.zeros(0, np.uint64)

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.order


class _Lent:
    """Stands for FFCV's ring of buffers for finished batches. Each batch gets a buffer that is not used again before
    nobody holds the batch any more.

    Args:
        shape: that of a batch.
        buffers: lends the memory.
    """

    def __init__(self, shape: tuple[int, ...], buffers: Buffers) -> None:
        self._shape, self._buffers = shape, buffers

    def __getitem__(self, slot: int) -> np.ndarray:
        return self._buffers.lend(self._shape, torch.uint8).numpy()


class _EpochIterator(EpochIterator):
    """FFCV's loading thread. An error that ends it is kept for the thread that waits, instead of being printed."""

    failure: Exception | None = None

    def run(self) -> None:
        try:
            if self.loader.buffers is not None:
                # One decoder has all memory: its results, then its scratch memory (see `_PlannedDecoder`).
                operations = self.memory_allocations["operation"]
                for node, (results, scratch) in operations.items():
                    operations[node] = _Lent(results.shape[1:], self.loader.buffers), scratch
            super().run()
        except Exception as error:
            self.failure = error


class _Loader(FfcvNativeLoader):
    """FFCV's loader with our loading thread. The lines before the thread are those of FFCV's `__iter__`.

    Attributes:
        buffers: lends the memory of batches; None leaves them in FFCV's ring, where they are overwritten.
    """

    buffers: Buffers | None = None

    def __iter__(self) -> EpochIterator:
        Compiler.set_num_threads(self.num_workers)
        order = self.next_traversal_order()[: len(self) * self.batch_size]
        self.next_epoch += 1
        if self.code is None or self.recompile:
            self.generate_code()
        return _EpochIterator(self, order)


class FfcvLoader(PlannedLoader):
    """The loader of the `ffcv` pipeline; see `sdpnet.pipelines.contract.Loader`.

    Making one compiles FFCV's pipeline, which takes several seconds. Raises `UserError` for shards that are not
    `.beton`.
    """

    masked: tuple[int, ...] = ()
    one_iterator = True

    def __init__(self, source: Source, manifest: Manifest) -> None:
        if not isinstance(source.reader, BetonReader):
            convert = "; to convert the images: sdpnet convert" * isinstance(source.reader, InPlaceReader)
            raise UserError(f"{source.reader.path}: FFCV reads .beton files only; use another --pipeline{convert}")
        self.source = source
        self._file = source.reader.file
        self.manifest = manifest
        self._batch_size = source.plan.batch_size // source.shard.world_size
        # FFCV decodes at most batches_ahead + 1 batches beyond the one that was yielded, and is working on one more.
        # The table must have room for all of them.
        self._lead = source.prefetch_batches + 3
        self._table = np.zeros((self._lead * self._batch_size, _COLUMNS), np.int64)
        self._copies = torch.cuda.Stream(source.device) if source.device.type == "cuda" else None
        self._compile()

    def _compile(self) -> None:
        source = self.source
        torch_threads = torch.get_num_threads()
        self._loader = _Loader(
            self._file.open_path(),
            batch_size=self._batch_size,
            num_workers=min(source.threads, nb.config.NUMBA_NUM_THREADS),
            os_cache=True,
            drop_last=False,
            batches_ahead=source.prefetch_batches,
            pipelines={"image": [_PlannedDecoder(source.plan.image_size, self._table)], "label": None},
        )
        # FFCV sets torch's thread count to its own number: CIFAR-10 training on two cores ran on one of them until it
        # was set back (records/LOG.md).
        torch.set_num_threads(torch_threads)
        # FFCV would map the file itself; only our map is guarded against a file that is cut while it is read.
        self._loader.memory_manager.context.mmap = self._file.data
        self._file.check()
        if self._copies is None:
            # Beside the batches in FFCV's ring, a loop holds the batch that it works on while it asks for the next one.
            nbytes = 3 * self._batch_size * source.plan.image_size**2
            self._loader.buffers = Buffers(nbytes, keep=source.prefetch_batches + 4)
        self._order = _PlannedOrder(self._loader)
        self._loader.traversal_order = self._order

    def set_plan(self, plan: Plan) -> None:
        compiled_for = self.source.plan.image_size
        self.source = self.source.with_plan(plan)
        if plan.image_size != compiled_for:
            self._compile()

    def batches(self, epoch: int = 0, start: int = 0) -> Generator[Batch, None, None]:
        count, lead = len(self), self._lead
        if start >= count:
            return
        slots = np.arange(start * self._batch_size, count * self._batch_size) % len(self._table)
        self._order.order = self._loader.first_traversal_order = slots.astype(np.uint64)
        plans = {index: self._fill_table(epoch, index) for index in range(start, min(start + lead, count))}
        iterator = self._begin()
        try:
            for index in range(start, count):
                # Nothing in this frame may keep the batch's memory.
                yield self._finish(self._next(iterator), index, plans.pop(index))
                if index + lead < count:
                    plans[index + lead] = self._fill_table(epoch, index + lead)
        finally:
            # After an early exit FFCV's thread would go on to decode the whole epoch, with boxes that were never filled
            # in, and OpenCV then aborts the process. Without batches to come, the thread ends after the current one.
            iterator.iter_ixes = iter(())
            while iterator.is_alive():  # it may be blocked because its queue is full
                while not iterator.output_queue.empty():
                    iterator.output_queue.get_nowait()
                iterator.join(timeout=0.01)
            iterator.close()

    def _finish(self, result: tuple[Any], index: int, plan: BatchPlan) -> Batch:
        """The batch of one of FFCV's results, on the loader's device."""
        failed = np.flatnonzero(self._slots(index)[:, _STATUS])
        path = self.source.reader.path
        if len(failed):
            self._file.check()  # a file that was cut would look like damaged images
            raise ShardError(f"{path}: sample {plan.sample_ids[failed[0]]}: damaged JPEG")
        images = torch.as_tensor(result[0])
        images = images if self._copies is None else self._on_gpu(images, self._copies)
        return self.source.batch(images, plan)

    def _begin(self) -> EpochIterator:
        """Starts FFCV's thread, which allocates memory for all batches that it works on at once."""
        torch_threads = torch.get_num_threads()
        try:
            return iter(self._loader)
        except Exception as error:
            raise self._failure(error) from error
        finally:
            torch.set_num_threads(torch_threads)

    def _next(self, iterator: EpochIterator) -> Any:
        """FFCV's next batch. FFCV's own `__next__` would wait forever after the loading thread has died."""
        while iterator.output_queue.empty():
            if not iterator.is_alive() and iterator.output_queue.empty():
                raise self._failure(iterator.failure) from iterator.failure
            time.sleep(0.0005)
        return next(iterator)

    def _failure(self, error: Exception | None) -> UserError:
        """Turns an error of FFCV, of the compiler or of the system into one line."""
        self._file.check()  # if the file was changed, that is the cause
        path, lines = self.source.reader.path, str(error or "its loading thread ended").strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if not isinstance(error, MemoryError) and "allocate memory" not in reason:
            return UserError(f"{path}: FFCV failed ({reason}); use --pipeline native (the default)")
        heights, widths = self.source.reader.sizes.astype(np.int64).T
        largest = int((heights * widths).argmax())
        count = self._batch_size * (self.source.prefetch_batches + 2)
        gigabytes = 3e-9 * count * heights[largest] * widths[largest]
        return UserError(
            f"{path}: FFCV needs {gigabytes:,.1f} GB of memory, for {count:,} images as large as the largest one "
            f"({widths[largest]} x {heights[largest]} pixels); use --pipeline native (the default), or lower "
            "data.batch_size_per_gpu or data.prefetch_batches, or convert with a smaller --max-side"
        )

    def _on_gpu(self, images: torch.Tensor, copies: torch.cuda.Stream) -> torch.Tensor:
        """Copies images to the GPU on a stream of its own, and waits for it: FFCV will overwrite `images`."""
        with torch.cuda.stream(copies):
            on_gpu = images.to(self.source.device, non_blocking=True)
        copies.synchronize()
        on_gpu.record_stream(torch.cuda.current_stream(self.source.device))  # allocated on the other stream
        return on_gpu

    def _slots(self, index: int) -> np.ndarray:
        """The slots of a batch: a view of the table, int64 (B, 7)."""
        first = index % self._lead * self._batch_size
        return self._table[first : first + self._batch_size]

    def _fill_table(self, epoch: int, index: int) -> BatchPlan:
        """Writes the samples, boxes and flips of a batch into the table, and returns its plan."""
        plan, slots = self.source.batch_plan(epoch, index), self._slots(index)
        slots[:, _TOP : _WIDTH + 1] = plan.crop_boxes
        slots[:, _FLIP] = plan.flips
        slots[:, _STATUS] = 0
        slots[:, _SAMPLE] = plan.sample_ids
        return plan

    def close(self) -> None:
        """Does nothing: an iterator releases everything when it ends."""


def make(source: Source, manifest: Manifest) -> FfcvLoader:
    return FfcvLoader(source, manifest)
