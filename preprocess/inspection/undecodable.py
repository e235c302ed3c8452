"""Finds stored images that cannot be decoded, for `verify --decode` and `adopt --decode`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.images.strict_jpeg import DamagedJpegError, decode_jpeg
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.layout import ShardReader

__all__ = ["undecodable"]

_BATCH: Final = 4096  # the number of images that are queued at a time, which bounds the memory of the queue


def undecodable(reader: ShardReader, num_workers: int, samples: np.ndarray | None = None) -> Iterator[tuple[int, str]]:
    """Decodes every JPEG of a split, or of these samples. Yields (sample, reason) if one cannot be decoded.

    Args:
        reader: the reader of the split.
        num_workers: the number of threads.
        samples: int64 (n,), the numbers of the samples; by default all of the split.
    """

    def check(sample: int) -> tuple[int, str] | None:
        height, width = reader.sizes[sample].tolist()
        try:
            decode_jpeg(reader.encoded(sample), height, width)
        except DamagedJpegError as error:
            return sample, f"cannot be decoded ({error})"
        except ShardError as error:  # the file of an image in place
            return sample, str(error)
        except MemoryError:
            return sample, f"no memory is left to decode its {height:,} x {width:,} pixels"
        return None

    jpegs = np.flatnonzero(reader.modes != MODE_RAW) if samples is None else samples
    with ThreadPoolExecutor(num_workers) as pool:
        for start in range(0, len(jpegs), _BATCH):
            piece = jpegs[start : start + _BATCH].tolist()
            yield from (found for found in pool.map(check, piece) if found is not None)
