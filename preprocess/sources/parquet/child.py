"""A process that lists the rows of Parquet files. A damaged file may crash it, or take too long.

stdin    a request: the files and the names of columns
stdout   for each file, an answer: its row groups and labels, or what is wrong with it

Requests and answers are marshalled, with their size before them.
"""

from __future__ import annotations

import ctypes
import hashlib
import marshal
import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from typing import Any, BinaryIO, Final

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.files.location import MachineError
from sdpnet.preprocess.sources.parquet.columns import Columns, choose_columns
from sdpnet.preprocess.sources.parquet.row import open_parquet, reading

__all__ = ["MESSAGE", "cpu_seconds", "list_rows", "main"]

MESSAGE: Final = struct.Struct("<Q")
_MEMORY: Final = 8 << 30  # bytes of addresses that the process may use more than at its start
_BATCH_ROWS: Final = 1 << 16
_TAIL: Final = struct.Struct("<I4s")  # the size of the metadata, and the mark of the format
_MARK: Final = b"PAR1"


def cpu_seconds(path: str) -> float:
    """The processor time after which the process is ended, for one file."""
    try:
        return 8 + min(os.path.getsize(path) / 1e8, 60)
    except OSError:
        return 8


def main() -> None:
    """The main function of the process. It reads the request, answers for each file, and ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    request, answers = sys.stdin.buffer, sys.stdout.buffer
    parent, paths, image, label = marshal.loads(request.read(MESSAGE.unpack(request.read(MESSAGE.size))[0]))
    with suppress(OSError, AttributeError):  # Linux ends the process when its parent is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    with suppress(ValueError, OSError):  # the addresses are limited already, or cannot be
        with open("/proc/self/statm", "rb") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    from pyarrow import set_cpu_count

    set_cpu_count(1)
    for path in paths:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds(path))  # SIGPROF ends the process
        try:
            answer: Any = list_rows(path, image, label)
        except (UserError, MachineError) as error:
            answer = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(answers, answer)


def _answer(answers: BinaryIO, answer: Any) -> None:
    content = marshal.dumps(answer)
    answers.write(MESSAGE.pack(len(content)) + content)
    answers.flush()


def list_rows(path: str, image: str | None, label: str | None) -> dict[str, Any]:
    """Lists the rows of a file.

    Args:
        path: the file.
        image, label: the columns that the user named; None to find them.

    Returns:
        `columns`, the values of `Columns`; `group_rows` and `group_bytes`, the rows of each row group and their bytes
        of images; `labels`, the bytes of int64 (num_rows,); `texts`, the names of the classes, if the labels are texts;
        `footer`, the size of the file and the SHA-256 of its metadata.

    Raises:
        UserError: the file cannot be read, has no such columns, or its images or labels are of no use.
        MachineError: the error does not concern the file.
    """
    with reading(path):
        footer = _footer(path)
        with open_parquet(path) as file:
            columns = choose_columns(file.schema_arrow, path, image, label)
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            _require_images(file, columns, path)
            leaf = _leaf(file, columns.image_bytes)
            group_rows = [group.num_rows for group in groups]
            group_bytes = [group.column(leaf).total_uncompressed_size for group in groups]
        dictionaries = [columns.label] if columns.is_text else []
        with open_parquet(path, dictionaries) as file:
            labels, texts = _labels(file, columns, path, sum(group_rows))
    return {
        "columns": (columns.image, columns.is_struct, columns.label, columns.is_text, columns.names),
        "group_rows": group_rows,
        "group_bytes": group_bytes,
        "labels": labels.tobytes(),
        "texts": texts,
        "footer": footer,
    }


def _footer(path: str) -> tuple[int, str]:
    """The size of a file and the SHA-256 of its metadata."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        tail = os.pread(file.fileno(), _TAIL.size, max(0, size - _TAIL.size))
        num_bytes, mark = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, b"")
        if mark != _MARK or num_bytes + 2 * len(_MARK) + 4 > size:
            raise UserError(f"{path}: not a complete Parquet file (it ends without its mark); download it again")
        digest = hashlib.sha256()
        at = size - _TAIL.size - num_bytes
        while at < size and (piece := os.pread(file.fileno(), min(1 << 20, size - at), at)):
            digest.update(piece)
            at += len(piece)
    return size, digest.hexdigest()


def _leaf(file: Any, path: str) -> int:
    """The number of the column of bytes among all columns that are stored."""
    schema = file.schema
    found = [number for number in range(len(schema)) if schema.column(number).path == path]
    if len(found) != 1:
        raise ValueError(f"no single column {path!r}")
    return found[0]


def _require_images(file: Any, columns: Columns, path: str) -> None:
    """Raises `UserError` if the first row has a path in the place of an image; reads one row."""
    if not columns.is_struct or not file.metadata.num_rows:
        return
    try:
        value = next(file.iter_batches(1, columns=[columns.image], use_threads=False)).column(0)[0]
        has_bytes = not value.is_valid or value["bytes"].is_valid
        where = value["path"].as_py() if not has_bytes and "path" in value.type.names else None
    except Exception:  # a damaged image is a matter of the conversion, which can skip it
        return
    if where:
        raise UserError(
            f"{path}: row 0 has no bytes of its image but only the path {where!r:.100}; write the files again with "
            "the images embedded (Dataset.to_parquet of `datasets` embeds them), or convert the folder of images"
        )


def _labels(file: Any, columns: Columns, path: str, num_rows: int) -> tuple[np.ndarray, list[str] | None]:
    """The labels of all rows, int64, and the sorted names if they are texts."""
    import pyarrow

    pieces = []
    codes: dict[str, int] = {}  # each text and its number, in the order of their first rows
    done = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=[columns.label], use_threads=False):
        values = batch.column(0)
        if values.null_count:
            first = done + int(np.flatnonzero(~np.asarray(values.is_valid()))[0])
            raise UserError(
                f"{path}: row {first} has no label (null in {columns.label!r}); fill it, or remove such rows"
            )
        if columns.is_text:
            if not isinstance(values, pyarrow.DictionaryArray):
                values = values.dictionary_encode()
            texts = [str(text) for text in values.dictionary.to_pylist()]
            known = np.array([codes.setdefault(text, len(codes)) for text in texts], np.int64)
            pieces.append(known[np.asarray(values.indices)])
        else:
            integers = values.to_numpy(zero_copy_only=False)
            low, high = int(integers.min()), int(integers.max())
            if low < 0 or high >= 1_000_000:
                row = done + int(np.flatnonzero((integers < 0) | (integers >= 1_000_000))[0])
                value = low if low < 0 else high
                remedy = "rows without a label, as in a test split, cannot be used" if value == -1 else "see its column"
                raise UserError(f"{path}: row {row}: label {value}, must be 0 to 999,999 ({columns.label!r}); {remedy}")
            pieces.append(integers.astype(np.int64))
        done += len(values)
    labels = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    if len(labels) != num_rows:
        raise ValueError(f"{len(labels):,} labels for {num_rows:,} rows")
    if not columns.is_text:
        return labels, None
    order = sorted(codes)
    places = np.empty(len(codes), np.int64)
    places[[codes[text] for text in order]] = np.arange(len(order))
    return (places[labels] if len(labels) else labels), order
