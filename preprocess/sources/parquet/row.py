"""The location of an image in a row of a Parquet file. This module imports little, because each worker imports it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from textwrap import shorten
from typing import Any, Final, NamedTuple

from sdpnet.pipelines.errors import UserError, printable
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file
from sdpnet.preprocess.sources.files.location import MACHINE_ERRORS, MAX_FILE_MB, Location, MachineError

__all__ = ["ImageLocation", "RowLocation", "location_of", "open_parquet", "reading"]

_BATCH_BYTES: Final = 1 << 24  # so many bytes of images are decoded at a time, if they are of the mean size
_BATCH_ROWS: Final = 64  # and at most so many rows
_BUFFER: Final = 1 << 20  # bytes that are read from the file at a time


class RowLocation(NamedTuple):
    """The location of an image in a row of a Parquet file.

    Attributes:
        name: the name of the image in messages.
        path: the file.
        column: the column with the bytes; `COLUMN.bytes` for a field of a struct.
        group: the row group.
        row: the row in the row group.
        size: the mean size of an image in the row group, in bytes.
    """

    name: str
    path: str
    column: str
    group: int
    row: int
    size: int

    def read(self, max_bytes: int = MAX_FILE_MB * 1_000_000) -> bytes:
        """Reads the bytes of the image. Rows are read fastest in ascending order: the file stays open in between.

        Raises:
            UserError: they cannot be read, are null, or are more than `max_bytes`.
            MachineError: the error does not concern the file.
        """
        global _open
        if _open is None or not _open.is_at(self):
            if _open is not None:
                _open.close()
            _open = _OpenGroup(self)
        try:
            value = _open.value(self)
        except BaseException as error:
            if not isinstance(error, UserError):
                _open.close()
                _open = None
            raise
        size = None if value is None else value.size
        if value is None or size is None:
            raise UserError(f"{self.name}: no image (null); fill it or remove the row")
        if size > max_bytes:
            raise UserError(
                f"{self.name}: {size:,} bytes, more than the {max_bytes:,} of --max-file-mb; remove or reduce the "
                "image, or raise --max-file-mb"
            )
        return bytes(value.to_pybytes())


ImageLocation = Location | RowLocation


def location_of(values: Sequence[Any]) -> ImageLocation:
    """The location with these values, which are the tuple that it was."""
    return RowLocation(*values) if len(values) == len(RowLocation._fields) else Location(*values)


class _OpenGroup:
    """A row group that is read in batches from its beginning."""

    def __init__(self, location: RowLocation) -> None:
        self._place = location.path, location.column, location.group
        self._start = 0  # the number of rows before `_values`
        self._values: Any = None
        self._failure: str | None = None  # why the rows behind `_values` cannot be read
        self._rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(location.size, 1)))
        self._file = ExitStack()
        self._batches: Iterator[Any] | None = None

    def close(self) -> None:
        """Closes the file and frees the memory."""
        self._batches = self._values = None
        self._file.close()

    def is_at(self, location: RowLocation) -> bool:
        """Whether the row can be read without going back."""
        return self._place == (location.path, location.column, location.group) and location.row >= self._start

    def value(self, location: RowLocation) -> Any:
        """The bytes of a row as a buffer of pyarrow; None if they are null.

        If a batch cannot be read, its rows are read one by one, up to the first one that cannot. All rows behind that
        one are lost, too, because a damaged row group cannot be read from its middle.
        """
        while self._values is None or location.row >= self._start + len(self._values):
            if self._failure is not None:
                raise UserError(f"{location.name}: {self._failure}")
            try:
                with reading(location.name):
                    self._advance()
            except UserError as error:
                if self._rows == 1:
                    self._failure = str(error).removeprefix(f"{printable(location.name)}: ")
                    self._start += 0 if self._values is None else len(self._values)
                self._rows = 1
                self.close()
                if self._failure is None:
                    self._start = 0
        return self._values[location.row - self._start].as_buffer()

    def _advance(self) -> None:
        """Reads the next batch."""
        path, column, group = self._place
        if self._batches is None:
            file = self._file.enter_context(open_parquet(path))
            self._batches = file.iter_batches(self._rows, row_groups=[group], columns=[column], use_threads=False)
        batch = next(self._batches, None)
        if batch is None:
            raise ValueError("its row group has fewer rows: the file has changed")
        self._start += 0 if self._values is None else len(self._values)
        values = batch.column(0)
        self._values = values.field("bytes") if hasattr(values, "field") else values


_open: _OpenGroup | None = None  # of this process


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns the errors of pyarrow into `UserError`. `name` is the image or file in the message."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except NotRegularError as error:
        raise UserError(f"{name}: {error.kind}, not a file; remove it") from None
    except Exception as error:  # pyarrow raises several types on damaged files
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise MachineError(error.errno, error.strerror, name) from None
        reason = shorten(" ".join(str(error).split()), 160) or type(error).__name__
        raise UserError(f"{name}: cannot be read ({reason}); copy or download the file again") from None


@contextmanager
def open_parquet(path: str, dictionaries: Sequence[str] = ()) -> Iterator[Any]:
    """Opens a Parquet file with pyarrow, which reads little of it at a time and compares the checksums that it has.

    Args:
        path: the file.
        dictionaries: columns of texts of which only the different values are decoded.

    Raises:
        NotRegularError: it is not a file.
        ImportError: pyarrow is not installed.
        Exception: of many types, if the file is damaged.
    """
    from pyarrow.parquet import ParquetFile

    with os.fdopen(open_regular_file(path), "rb", buffering=0) as file:
        yield ParquetFile(
            file, read_dictionary=list(dictionaries), buffer_size=_BUFFER, page_checksum_verification=True
        )
