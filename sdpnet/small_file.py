"""Reads small files of a run whole, whatever lies under their names: a pipe, a device or a terabyte of zeros."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["read_small"]

LARGEST: Final = 1 << 26  # bytes; the names of 22,000 classes take one megabyte


def read_small(path: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a file. Waits for no writer of a pipe.

    Raises `OSError` when it cannot be read, and `ValueError` when it is not a file or has more than `largest` bytes.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")
        if status.st_size > largest:
            raise ValueError(f"{status.st_size:,} bytes, more than the {largest:,} that such a file may have")
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"more than the {largest:,} bytes that such a file may have")
    return content
