"""Which stored images cannot be decoded: what `verify --decode` and `adopt --decode` ask of every image."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from sdpnet.pipelines.images.strict_jpeg import DamagedJpegError, decode_jpeg
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.layout import ShardReader

__all__ = ["undecodable"]

_AT_ONCE: Final = 4096  # images that are handed to the threads before the first answer is taken


def undecodable(reader: ShardReader, num_workers: int) -> Iterator[tuple[int, str]]:
    """Decodes every JPEG of a split, in so many threads; yields (sample, why) for each that cannot be."""

    def check(sample: int) -> tuple[int, str] | None:
        height, width = reader.sizes[sample].tolist()
        try:
            decode_jpeg(reader.encoded(sample), height, width)
        except DamagedJpegError as error:
            return sample, f"cannot be decoded ({error})"
        except MemoryError:
            return sample, f"no memory is left to decode its {height:,} x {width:,} pixels"
        return None

    jpegs = np.flatnonzero(reader.modes != MODE_RAW).tolist()
    with ThreadPoolExecutor(num_workers) as pool:
        for start in range(0, len(jpegs), _AT_ONCE):
            yield from (found for found in pool.map(check, jpegs[start : start + _AT_ONCE]) if found is not None)
