"""The statuses of images in the native decoder and the native JPEG codec. The numbers are those of `task.h`."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """The result of decoding or encoding one image."""

    OK = 0
    DAMAGED = 1
    UNSUPPORTED = 2
    TOO_LARGE = 3  # a decompression bomb
    NO_MEMORY = 4
    TOO_LONG = 5  # a side is longer than allowed; used by the codec only
