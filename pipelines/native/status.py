"""The results of the native decoder and the native JPEG codec for an image. The numbers are those of `task.h`."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """The result of decoding or encoding one JPEG."""

    OK = 0
    DAMAGED = 1
    UNSUPPORTED = 2
    TOO_LARGE = 3  # more pixels than the limit against decompression bombs
    NO_MEMORY = 4
    TOO_LONG = 5  # a side is longer than allowed; only the codec returns this
    NO_FILE = 6  # the image's file is missing, was changed or cannot be read; only the decoder returns this
