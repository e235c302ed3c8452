"""Where one image's bytes lie. Imports next to nothing: each worker process starts with it."""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file

__all__ = ["MAX_FILE_MB", "Location", "MachineError"]

MAX_FILE_MB: Final = 1_100  # 178,956,970 pixels of 16-bit RGB without compression, and their header
_LARGE: Final = 1 << 26  # bytes of a file whose beginning is looked at before the rest is read
_HEAD_BYTES: Final = 4096
# What says nothing of a file: the machine has no more descriptors or memory.
_OF_MACHINE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


class MachineError(OSError):
    """A file could not be opened or read, and may well be when the machine is less busy."""


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

    def read(self, max_bytes: int = MAX_FILE_MB * 1_000_000) -> bytes:
        """The image file's bytes. Raises `UserError` when they cannot be read, are more than `max_bytes` or no longer
        all there, or when the file is of another kind: a pipe has no end, and waits for whoever writes into it. Raises
        `MachineError` when that is not the file's fault."""
        try:
            file = open_regular_file(self.path)
            try:
                status = os.fstat(file)
                size = max(status.st_size - self.offset, 0) if self.size is None else self.size
                if size > max_bytes:
                    written = status.st_blocks * 512
                    sparse = (
                        f", a sparse file of which {written:,} bytes are on the disk" if written < size // 2 else ""
                    )
                    raise UserError(
                        f"{self.name}: {size:,} bytes{sparse}, more than the {max_bytes:,} of --max-file-mb; remove or "
                        "reduce it, or raise that"
                    )
                if size > _LARGE:
                    self._require_image(os.pread(file, _HEAD_BYTES, self.offset))
                data = os.pread(file, size, self.offset)
                while len(data) < size and (more := os.pread(file, size - len(data), self.offset + len(data))):
                    data += more
            finally:
                os.close(file)
        except NotRegularError as error:
            raise UserError(f"{self.name}: {error.kind}, not a file; remove it") from None
        except OSError as error:
            if error.errno in _OF_MACHINE:
                raise MachineError(error.errno, error.strerror, self.path) from None
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from None
        if self.size is not None and len(data) < self.size:
            raise UserError(
                f"{self.name}: only {len(data):,} of its {self.size:,} bytes are left; copy {self.path} again"
            )
        return data

    def _require_image(self, head: bytes) -> None:
        """Raises `UserError` unless a file that begins so may be an image."""
        from sdpnet.pipelines.images.kinds import kind_of

        kind = kind_of(head)
        if kind.format is None:
            raise UserError(f"{self.name}: {kind.refusal}")
