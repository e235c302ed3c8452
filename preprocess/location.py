"""Where one image's bytes lie. Imports next to nothing: each worker process starts with it."""

from __future__ import annotations

import os
from typing import NamedTuple

from pipelines.errors import UserError

__all__ = ["Location"]


class Location(NamedTuple):
    """Where one image's bytes lie.

    Attributes:
        name: what an error calls the image.
        path: the file that holds it.
        offset: its first byte in that file.
        size: in bytes; None: up to the file's end.
    """

    name: str
    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The image file's bytes. Raises `UserError` when they cannot be read, or are no longer all there."""
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(file).st_size - self.offset if self.size is None else self.size
                data = os.pread(file, max(size, 0), self.offset)
                while len(data) < size and (more := os.pread(file, size - len(data), self.offset + len(data))):
                    data += more
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from None
        if self.size is not None and len(data) < self.size:
            raise UserError(
                f"{self.name}: only {len(data):,} of its {self.size:,} bytes are left; copy {self.path} again"
            )
        return data
