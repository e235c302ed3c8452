"""The location of the bytes of one image. This module imports little, because each worker process imports it."""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file

__all__ = ["MACHINE_ERRORS", "MAX_FILE_MB", "Location", "MachineError"]

MAX_FILE_MB: Final = 1_100  # 178,956,970 pixels of 16-bit RGB without compression, and their header
_LARGE: Final = 1 << 26  # bytes; the beginning of a larger file is checked before the rest is read
_HEAD_BYTES: Final = 4096
# Errors that do not concern the file: the machine has no descriptors or memory left.
MACHINE_ERRORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


class MachineError(OSError):
    """A file could not be opened or read now, but may be readable when the machine is less busy."""


class Location(NamedTuple):
    """The location of the bytes of one image.

    Attributes:
        name: the name of the image in messages.
        path: the file that contains the image.
        offset: the position of its first byte in that file.
        size: its size in bytes; None if it ends with the file.
    """

    name: str
    path: str
    offset: int = 0
    size: int | None = None

    def read(self, max_bytes: int = MAX_FILE_MB * 1_000_000) -> bytes:
        """Reads the bytes of the image.

        Raises:
            UserError: they cannot be read, are more than `max_bytes`, or are no longer complete; or the path is not a
                regular file. A pipe has no end, and opening it waits for a writer.
            MachineError: the error does not concern the file.
        """
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
                        "reduce the file, or raise --max-file-mb"
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
            if error.errno in MACHINE_ERRORS:
                raise MachineError(error.errno, error.strerror, self.path) from None
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from None
        if self.size is not None and len(data) < self.size:
            raise UserError(
                f"{self.name}: only {len(data):,} of its {self.size:,} bytes are left; copy {self.path} again"
            )
        return data

    def _require_image(self, head: bytes) -> None:
        """Raises `UserError` unless a file that begins with these bytes may be an image."""
        from sdpnet.pipelines.images.kinds import kind_of

        kind = kind_of(head)
        if kind.format is None:
            raise UserError(f"{self.name}: {kind.refusal}")
