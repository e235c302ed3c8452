"""Reads arrays from .npy files and lines from text files that other people made. Nothing is ever unpickled."""

from __future__ import annotations

import math
import os
from typing import Final

import numpy as np
from numpy.lib import format as npy

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file

__all__ = ["read_array", "read_lines"]

_MAX_HEADER: Final = 10_000  # bytes, numpy's own limit
_MAX_TEXT: Final = 1 << 28  # bytes
_KINDS: Final = "iufb"


def read_array(path: str | os.PathLike[str], key: str) -> np.ndarray:
    """Reads an array of numbers from an .npy file.

    Args:
        path: the file.
        key: the setting that names it, for errors.

    Raises:
        UserError: the file cannot be read, is not an .npy file of whole or other real numbers, or has another size
            than its header says. Objects (pickles) are refused, and nothing is read before the size is checked.
    """
    name = f"{key}: {os.fspath(path)}"
    remedy = "write it with numpy.save"
    with os.fdopen(_open(path, key), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            version = npy.read_magic(file)
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"version {version}")
            reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = reader(file, max_header_size=_MAX_HEADER)
        except Exception as error:  # numpy raises several types for damaged headers
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{name}: not an .npy file ({reason}); {remedy}") from None
        if dtype.hasobject or dtype.kind not in _KINDS or dtype.itemsize > 16:
            raise UserError(f"{name}: has values of type {dtype}, must be numbers; {remedy}")
        if any(side < 0 for side in shape) or len(shape) > 8:
            raise UserError(f"{name}: has the impossible shape {shape}; {remedy}")
        count = math.prod(shape)
        if count * dtype.itemsize != size - file.tell():
            raise UserError(f"{name}: {size:,} bytes do not fit the shape {shape} of {dtype}; copy it again")
        values = np.empty(count, dtype)
        if count and file.readinto(values.view(np.uint8).data) != values.nbytes:
            raise UserError(f"{name}: became shorter while it was read; copy it again")
    values = values.astype(dtype.newbyteorder("="), copy=False)
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def read_lines(path: str | os.PathLike[str], key: str) -> list[str]:
    """Reads the lines of a UTF-8 text file, without spaces around them and without empty lines.

    Raises `UserError` if it cannot be read, is not text, or has no line.
    """
    with os.fdopen(_open(path, key), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MAX_TEXT:
            raise UserError(f"{key}: {os.fspath(path)}: more than {_MAX_TEXT:,} bytes, so it is no list")
        content = file.read()
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{key}: {os.fspath(path)}: not UTF-8 text; save it as UTF-8") from None
    if not any(lines):
        raise UserError(f"{key}: {os.fspath(path)}: is empty; write one entry in each line")
    return [line for line in lines if line]


def _open(path: str | os.PathLike[str], key: str) -> int:
    try:
        return open_regular_file(path)
    except NotRegularError as error:
        raise UserError(f"{key}: {os.fspath(path)}: is {error.kind}, not a file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: {os.fspath(path)}: cannot be read ({reason})") from None
