"""The places of stored images, in the form in which the native decoder takes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Places"]


class Places(NamedTuple):
    """The places of some samples' images.

    Attributes:
        addresses: uint64 (n,), the address in memory of each image that is mapped. They are valid as long as the reader
            exists.
        nbytes: int64 (n,), the number of bytes of each image.
        files: `sdpnet.pipelines.native.decoder.FILE_DTYPE` (n,), the images that are read from files; None if all
            images are mapped. Their names are valid as long as this array, their folders as long as the reader.
    """

    addresses: np.ndarray
    nbytes: np.ndarray
    files: np.ndarray | None = None
