"""How the native decoder and the native JPEG codec answer for an image; their numbers are `Status` in `task.h`."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """The decoder's and the codec's verdict on one JPEG."""

    OK = 0
    DAMAGED = 1
    UNSUPPORTED = 2
    TOO_LARGE = 3  # a decompression bomb
    NO_MEMORY = 4
    TOO_LONG = 5  # than the side that is allowed: of the codec alone
