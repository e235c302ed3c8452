"""Lists the rows of Parquet files in another process, so that a damaged file can end neither this one nor a conversion.

The files are in the order in which they are given, and the rows in their order in each file.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

import sdpnet
from sdpnet.pipelines.errors import BackendMissingError, UserError
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.preprocess.sources.parquet.child import MESSAGE, cpu_seconds
from sdpnet.preprocess.sources.parquet.columns import Columns

__all__ = ["Rows", "list_parquet"]

_ROOT: Final = Path(sdpnet.__file__).resolve().parent.parent


class Rows(NamedTuple):
    """The rows of Parquet files.

    Attributes:
        columns: the columns, which are the same in all files.
        footers: the size of each file in bytes and the SHA-256 of its metadata.
        groups: int32 (num_groups, 2), the file and the number of each row group.
        starts: int64 (num_groups + 1,), the number of rows before each row group, and of all rows.
        file_starts: int64 (num_files,), the number of rows before each file.
        sizes: int64 (num_groups,), the mean size of an image in each row group, in bytes.
        labels: int64 (num_rows,).
        texts: the sorted names of the classes if the labels are texts, or None.
    """

    columns: Columns
    footers: tuple[tuple[int, str], ...]
    groups: np.ndarray
    starts: np.ndarray
    file_starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    texts: tuple[str, ...] | None


def list_parquet(paths: Sequence[Path], image: str | None = None, label: str | None = None) -> Rows:
    """Lists the rows of Parquet files. Reads their metadata and labels, but only one image of each.

    Args:
        paths: the files.
        image, label: the columns of the images and labels; None to find them.

    Raises:
        BackendMissingError: pyarrow is not installed.
        UserError: a file cannot be read or crashes pyarrow; the columns are not found; the files have different columns
            or class names; or there are no rows. The message names the file.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise BackendMissingError(f"{paths[0]}: Parquet files need pyarrow; to install it: {install_extra('parquet')}")
    groups: list[tuple[int, int]] = []
    group_rows: list[int] = []
    sizes: list[int] = []
    file_rows: list[int] = []
    footers: list[tuple[int, str]] = []
    labels: list[np.ndarray] = []
    codes: dict[str, int] = {}
    first: Columns | None = None
    for number, answer in enumerate(_answers([str(path) for path in paths], image, label)):
        if isinstance(answer, str):
            raise UserError(answer)
        columns = Columns(*answer["columns"])
        first = first or columns
        if columns != first:
            raise UserError(
                f"{paths[number]}: {_difference(columns, first)} than {paths[0].name}; name only files of one data set"
            )
        footers.append(answer["footer"])
        groups += [(number, group) for group in range(len(answer["group_rows"]))]
        group_rows += answer["group_rows"]
        sizes += [size // max(rows, 1) for size, rows in zip(answer["group_bytes"], answer["group_rows"], strict=True)]
        values = np.frombuffer(answer["labels"], np.int64)
        file_rows.append(len(values))
        if columns.is_text:
            values = np.array([codes.setdefault(text, len(codes)) for text in answer["texts"]], np.int64)[values]
        labels.append(values)
    assert first is not None
    values = np.concatenate(labels)
    if not len(values):
        raise UserError(f"{paths[0]}: no rows in {'it' if len(paths) == 1 else 'these files'}; download them again")
    texts = None
    if first.is_text:
        texts = tuple(sorted(codes))
        places = np.empty(len(codes), np.int64)
        places[[codes[text] for text in texts]] = np.arange(len(texts))
        values = places[values]
    return Rows(
        first,
        tuple(footers),
        np.array(groups, np.int32).reshape(-1, 2),
        np.cumsum([0, *group_rows], dtype=np.int64),
        np.cumsum([0, *file_rows[:-1]], dtype=np.int64),
        np.array(sizes, np.int64),
        values,
        texts,
    )


def _difference(columns: Columns, first: Columns) -> str:
    if (columns.image, columns.label) != (first.image, first.label):
        return f"other columns ({columns.image!r} and {columns.label!r})"
    return "other class names" if columns.names != first.names else "other types of columns"


def _answers(paths: list[str], image: str | None, label: str | None) -> Iterator[Any]:
    """Yields the answer of the process for each file: that of `list_rows`, or an error message."""
    path = [*(entry or os.getcwd() for entry in sys.path), str(_ROOT)]
    code = f"import sys; sys.path[:] = {path!r}; from sdpnet.preprocess.sources.parquet.child import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )  # without `site`, whose only effect here would be the path
    assert process.stdin is not None and process.stdout is not None
    try:
        content = marshal.dumps((os.getpid(), paths, image, label))
        try:
            process.stdin.write(MESSAGE.pack(len(content)) + content)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already, which is noticed below
        for current in paths:
            header = process.stdout.read(MESSAGE.size)
            content = process.stdout.read(MESSAGE.unpack(header)[0]) if len(header) == MESSAGE.size else b""
            if not content:
                raise _died(process.wait(), current)
            yield marshal.loads(content)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _died(status: int, path: str) -> UserError:
    if status == -signal.SIGPROF:
        seconds = cpu_seconds(path)
        return UserError(f"{path}: takes more than {seconds:.0f} s to list; it is damaged: copy or download it again")
    if status == -signal.SIGKILL:
        return UserError(f"{path}: the process that lists it was ended by SIGKILL (out of memory?); free some memory")
    if status < 0:
        return UserError(f"{path}: crashes pyarrow ({signal.Signals(-status).name}); copy or download it again")
    return UserError(f"{path}: the process that lists it cannot run (status {status}); see its message above")
