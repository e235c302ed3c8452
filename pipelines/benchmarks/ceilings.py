"""Single steps of a decoder, in C++ (`native/ceilings.h`). No decoder that takes such a step is faster than it.

The library is optional, since it is used for measurements only. `available()` tells whether it can be used.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from sdpnet.pipelines.benchmarks.flags import CEILINGS
from sdpnet.pipelines.benchmarks.stream import job_plan
from sdpnet.pipelines.benchmarks.worker import Job
from sdpnet.pipelines.errors import BackendMissingError, ShardError, UserError
from sdpnet.pipelines.images.strict_jpeg import decode_jpeg
from sdpnet.pipelines.native.library import NativeLibrary, library_path
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.remedy import rebuild

__all__ = ["CEILINGS", "CeilingStream", "available", "open_ceiling", "turbo_version"]


def available() -> bool:
    """Whether the library was built by this version of the package and can be loaded."""
    return LIBRARY.available()


def turbo_version() -> str:
    """The version of libjpeg-turbo that the native code was built with."""
    return _loaded().ceilings_turbo_version().decode()


class CeilingStream:
    """See `sdpnet.pipelines.benchmarks.worker.Stream`. A batch is one step for each image of the plan's first batch."""

    crops = "plan"

    def __init__(self, job: Job) -> None:
        library = _loaded()
        _, reader = open_split(job.data, job.split)
        if (reader.modes == MODE_RAW).any():
            raise UserError(f"{reader.path}: holds raw pixels; there is no JPEG to decode")
        plan = job_plan(job, reader.sizes).batch(0, 0)
        encoded = [reader.encoded(int(sample)) for sample in plan.sample_ids]
        sizes = np.ascontiguousarray(reader.sizes[plan.sample_ids], np.uint32)
        boxes = np.ascontiguousarray(plan.crop_boxes, np.uint32)
        images, extra = encoded, []
        arrays: list[np.ndarray] = [np.array([data.size for data in encoded], np.uint64)]
        if job.contestant == "resize":
            images = [decode_jpeg(data, *size) for data, size in zip(encoded, sizes.tolist(), strict=True)]
            arrays, extra = [sizes, boxes], [job.image_size]
        self._kept = images  # kept alive, because the library gets their addresses
        addresses = np.array([image.ctypes.data for image in images], np.uint64)
        function = getattr(library, f"ceilings_{job.contestant}")
        self._pool = ThreadPoolExecutor(len(job.cores))
        self._calls: list[Callable[[], int]] = []
        for part in np.array_split(np.arange(len(images)), len(job.cores)):
            taken = [np.ascontiguousarray(array[part]) for array in (addresses, *arrays)]
            self._calls.append(partial(_call, function, taken, extra))
        self._where = f"{reader.path}: the first {len(images)} samples of the plan"

    def batches(self, count: int) -> Generator[tuple[int, None], None, None]:
        for _ in range(count):
            done = sum(self._pool.map(lambda call: call(), self._calls))
            if done != len(self._kept):
                raise ShardError(f"{self._where}: {len(self._kept) - done} cannot be decoded")
            yield done, None


def open_ceiling(job: Job) -> CeilingStream:
    return CeilingStream(job)


def _call(function: Any, arrays: list[np.ndarray], extra: list[int]) -> int:
    """Calls a function of the library. Returns the number of images for which it succeeded."""
    return function(*(array.ctypes.data for array in arrays), len(arrays[0]), *extra)


def _loaded() -> ctypes.CDLL:
    try:
        return LIBRARY.load()
    except OSError:
        raise BackendMissingError(f"the native ceilings are not built: {rebuild()}") from None


def _declare(library: Any) -> None:
    pointer, size, side = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
    library.ceilings_turbo_version.restype = ctypes.c_char_p
    library.ceilings_decode.argtypes = library.ceilings_huffman.argtypes = (pointer, pointer, size)
    library.ceilings_resize.argtypes = (pointer, pointer, pointer, size, side)
    for name in CEILINGS:
        getattr(library, f"ceilings_{name}").restype = size


_FOLDER = os.path.join(os.path.dirname(__file__), os.pardir, "native")
LIBRARY = NativeLibrary(library_path(_FOLDER, "ceilings"), ("ceilings_interface", 1), _declare)
