"""The files of a set: what is no file of data is refused before it is read, and an open file stays what it was."""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from special_files import SPECIAL_FILES

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.shards.file import MappedFile, read_whole, size_of
from sdpnet.pipelines.shards.layout import sha256_of

PAGE = mmap.PAGESIZE
CONTENT = np.arange(3 * PAGE + 100, dtype=np.uint32).astype(np.uint8).tobytes()

# Reads a file in a child, after it was cut: the system would end the process with SIGBUS.
READ_CUT = """
import os, sys
from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.file import MappedFile
file = MappedFile(sys.argv[1])
before = file.data[:10].tobytes()
os.truncate(sys.argv[1], 5000)
print(file.data.sum() >= 0, file.data[-1], file.data[:10].tobytes() == before)
try:
    file.check()
except ShardError as error:
    print(error)
os.truncate(sys.argv[1], file.size)
os.utime(sys.argv[1], ns=(file.identity[3], file.identity[3]))
try:
    file.check()
except ShardError as error:
    print(error)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("kind", sorted(set(SPECIAL_FILES) - {"empty file"}))
def test_what_is_no_file_of_data(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    SPECIAL_FILES[kind](path)
    readers = [lambda: read_whole(path, 1000, "the 1,000 that it may have"), lambda: MappedFile(path, 1000)]
    if kind != "sparse terabyte":
        readers += [lambda: size_of(path), lambda: sha256_of(path)]
    for read in readers:
        with pytest.raises(ShardError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith("; copy it again")


def test_the_kind_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ShardError, match=r"pipe: cannot be read \(it is a named pipe, not a file of data\); copy"):
        size_of(tmp_path / "pipe")
    with pytest.raises(ShardError, match="it is a device"):
        size_of("/dev/zero")
    for name in ("a\0b", "a" * 300):
        with pytest.raises(ShardError, match="cannot be read"):
            size_of(tmp_path / name)


def test_reads_what_is_there(path: Path) -> None:
    file = MappedFile(path, len(CONTENT))
    assert file.data.tobytes() == CONTENT == read_whole(path, len(CONTENT), "it may have")
    assert not file.data.flags.writeable
    assert file.read(np.dtype("<u2"), 10, 20).tobytes() == CONTENT[10:50] == file.view(10, 40).tobytes()
    file.check()
    with pytest.raises(ShardError, match="may have"):
        read_whole(path, len(CONTENT) - 1, "it may have")
    with pytest.raises(ShardError, match=f"{len(CONTENT):,} bytes, not the manifest's 7"):
        MappedFile(path, 7)


def test_a_replaced_file_is_still_the_old_one(path: Path) -> None:
    file = MappedFile(path)
    other = path.with_name("other")
    other.write_bytes(bytes(len(CONTENT)))
    other.replace(path)
    file.check()
    assert file.data.tobytes() == CONTENT == Path(file.open_path()).read_bytes()
    with pytest.raises(ShardError, match="changed or replaced since another process"):
        pickle.loads(pickle.dumps(file))


@pytest.mark.parametrize("is_built", [True, False])
def test_a_changed_file_is_noticed(is_built: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_built:
        monkeypatch.setattr(native_decoder, "available", lambda: False)
    file = MappedFile(path)
    copy = pickle.loads(pickle.dumps(file))
    assert copy.data.tobytes() == file.data.tobytes()
    with path.open("r+b") as writing:
        writing.write(b"x")
    os.utime(path, ns=(1, 1))  # whatever the clock's resolution
    for changed in (file, copy):
        with pytest.raises(ShardError, match=r"file: was changed while it was in use: its tables no longer fit"):
            changed.check()
    os.truncate(path, 100)
    with pytest.raises(ShardError, match=r"now has 100 bytes instead of"):
        file.check()
    with pytest.raises(ShardError, match=r"now has 100 bytes instead of"):
        file.read(np.dtype(np.uint8), 90, 11)


def test_cut_before_it_is_mapped(path: Path) -> None:
    file = MappedFile(path)
    os.truncate(path, 100)
    with pytest.raises(ShardError, match=r"now has 100 bytes"):
        _ = file.data


def child(*arguments: object) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_read_behind_the_cut_ends_no_process(native: None, path: Path) -> None:
    ended = child("-c", READ_CUT, path)
    assert ended.returncode == 0, ended.stderr
    read, *errors = ended.stdout.splitlines()
    assert read == "True 0 True"
    assert "now has 5,000 bytes instead of" in errors[0]
    assert "a part of it cannot be read: the disk has failed, or it was cut" in errors[1]  # it looks whole again


def test_other_bus_errors_still_end_the_process(native: None, path: Path, tmp_path: Path) -> None:
    """Of a map that is not ours, and of a signal that is sent; and Python's own report of it is printed."""
    own = "import os, signal, sys, mmap, faulthandler; from sdpnet.pipelines.shards.file import MappedFile; "
    own += "file = MappedFile(sys.argv[1]); file.data; "
    other = "f = open(sys.argv[2], 'r+b'); m = mmap.mmap(f.fileno(), 9000); os.truncate(sys.argv[2], 10); m[8000]"
    for end in (other, "os.kill(os.getpid(), signal.SIGBUS)", f"faulthandler.enable(); {other}"):
        (tmp_path / "other").write_bytes(bytes(9000))
        ended = child("-c", own + end, path, tmp_path / "other")
        assert ended.returncode == -signal.SIGBUS, ended.stderr
        assert ("Bus error" in ended.stderr) == ("faulthandler" in end)
    (tmp_path / "other").write_bytes(bytes(9000))
    ended = child("-X", "faulthandler", "-c", own + other, path, tmp_path / "other")
    assert ended.returncode == -signal.SIGBUS and "Bus error" in ended.stderr


def test_many_files_raise_the_limit_on_open_ones(path: Path) -> None:
    """Each stays open: 40 tars where 30 descriptors are allowed until more are asked for."""
    many = "import resource, sys; from sdpnet.pipelines.shards.file import MappedFile; "
    many += "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; "
    many += "resource.setrlimit(resource.RLIMIT_NOFILE, (30, hard)); "
    many += "files = [MappedFile(sys.argv[1]) for _ in range(40)]; print(sum(file.data[5] for file in files))"
    ended = child("-c", many, path)
    assert ended.stdout == "200\n", ended.stderr
