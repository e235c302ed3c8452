"""Reads small files whole, and refuses pipes, devices and files of unreasonable size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from sdpnet.pipelines.files.regular import open_regular_file

__all__ = ["read_small"]

LARGEST: Final = 1 << 26  # bytes; the names of 22,000 classes take one megabyte


def read_small(path: Path, largest: int = LARGEST) -> bytes:
    """Reads a whole file. Never waits for a pipe's writer.

    Raises `OSError` if it cannot be read, and `ValueError` if it is not a file or has more than `largest` bytes.
    """
    with open(open_regular_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"{size:,} bytes, more than the {largest:,} that such a file may have")
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"more than the {largest:,} bytes that such a file may have")
    return content
