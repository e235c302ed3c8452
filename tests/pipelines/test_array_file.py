"""Arrays of other people: .npy files are checked before they are read, and never unpickled."""

from __future__ import annotations

import io
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.array_file import read_array, read_lines


@pytest.mark.parametrize(
    "array",
    [
        np.arange(7, dtype=np.int16),
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.zeros((0, 3)),
        np.array(3.5),
        np.array([True, False]),
    ],
    ids=str,
)
def test_reads_what_numpy_wrote(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    read = read_array(tmp_path / "a.npy", "labels")
    assert np.array_equal(read, array) and read.shape == array.shape and read.dtype.isnative


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an .npy file"),
        (b"PK\x03\x04", "not an .npy file"),
        (pickle.dumps(Trap()), "not an .npy file"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", pickle.dumps(Trap())), "must be numbers"),
        (npy("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}\n", b"a" * 16), "must be numbers"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (10**15,)}\n"), "not an .npy file"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,)}\n"), "do not fit the shape"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}\n", b"a" * 8), "impossible shape"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}\n", b"a" * 8), "do not fit the shape"),
        (npy("__import__('os').mkdir('trapped')\n"), "not an .npy file"),
        (npy("[" * 5000), "not an .npy file"),
    ],
    ids=["empty", "zip", "pickle", "objects", "texts", "expression", "huge", "negative", "short", "code", "deep"],
)
def test_hostile_files_are_refused(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_array(path, "labels")
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "trapped").exists()


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(40, dtype=np.float32).reshape(10, 4))
    original = buffer.getvalue()
    draw = random.Random(0)
    path = tmp_path / "x.npy"
    for _ in range(500):
        content = bytearray(original)
        for _ in range(draw.randint(1, 6)):
            content[draw.randrange(0, 128 if draw.random() < 0.8 else len(content))] = draw.randrange(256)
        path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        try:
            array = read_array(path, "labels")
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert array.dtype.kind in "iufb" and array.nbytes <= len(original)


def test_special_files_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(UserError, match="is a named pipe, not a file"):
        read_array(tmp_path / "pipe.npy", "weights")
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_lines(tmp_path, "classes")
    with pytest.raises(UserError, match="cannot be read"):
        read_array("a\0b.npy", "weights")


def test_lists_are_text(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffant\r\n\r\n  bee \n".encode())
    assert read_lines(path, "classes") == ["ant", "bee"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_lines(path, "classes")
    path.write_bytes(b"\n")
    with pytest.raises(UserError, match="is empty"):
        read_lines(path, "classes")
