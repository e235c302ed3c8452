"""Where one image's bytes lie. Imports next to nothing: each worker process starts with it."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import UserError

__all__ = ["Location"]


@dataclass(frozen=True)
class Location:
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
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(-1 if self.size is None else self.size)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from None
        if self.size is not None and len(data) < self.size:
            raise UserError(
                f"{self.name}: only {len(data):,} of its {self.size:,} bytes are left; copy {self.path} again"
            )
        return data
