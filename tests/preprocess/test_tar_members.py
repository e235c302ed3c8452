"""The fast reader of tar headers, compared with Python's tarfile."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from container_files import tar_bytes

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.files import tar_members
from sdpnet.preprocess.sources.files.tar_members import Member, TarMembers, TarWindow, entries

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def both(path: Path) -> tuple[list[Member] | str, list[Member] | str]:
    """What the fast reader and what tarfile finds in a tar; the message of an error in place of a list."""
    found: list[list[Member] | str] = []
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for fast in (True, False):
            window = TarWindow(file.fileno(), 0, size)
            try:
                if fast:
                    found.append(list(TarMembers(window, "t.tar")))
                else:
                    tarfiles = entries(window, "t.tar")
                    found.append([Member(e.name, e.offset_data, e.size, e.isdir()) for e in tarfiles])
            except UserError as error:
                found.append(str(error))
    return found[0], found[1]


def odd_names() -> list[str]:
    return ["a.jpg", "./b.jpg", "c/d/e.jpg", "ü/é.png", "x" * 100, "y" * 101, "z" * 90 + "/" + "w" * 90, "v" * 300]


@pytest.mark.parametrize("format", FORMATS)
def test_all_formats_of_tarfile(tmp_path, format):
    rng = np.random.default_rng(0)
    names = [name for name in odd_names() if format != tarfile.USTAR_FORMAT or len(name) < 100 or "/" in name]
    files = [(name, rng.bytes(int(rng.integers(1200)))) for name in names] + [("empty", b""), ("large", bytes(70_000))]
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes(files, format))
    fast, slow = both(path)
    assert fast == slow and len(fast) == len(files)


def test_most_headers_are_read_fast(tmp_path, monkeypatch):
    """PAX records of times, as the webdataset library writes them, and folders need no tarfile."""
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number in range(100):
            entry = tarfile.TarInfo(f"folder/{number}")
            entry.mtime = 1.5
            archive.addfile(entry)
    _, slow = both(path)
    calls = []
    real = tar_members._checked
    monkeypatch.setattr(tar_members, "_checked", lambda *arguments: calls.append(arguments) or real(*arguments))
    with path.open("rb", buffering=0) as file:
        window = TarWindow(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        assert list(TarMembers(window, "t.tar")) == slow and len(slow) == 101
    assert len(calls) == 1  # at the end mark


def test_global_records_apply_to_all_later_entries(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x", "gname": "y"}) as archive:
        for name in ("a", "b" * 200, "c"):
            archive.addfile(tarfile.TarInfo(name))
    fast, slow = both(path)
    assert fast == slow and [member.name for member in fast] == ["a", "b" * 200, "c"]


@pytest.mark.parametrize("seed", range(40))
def test_changed_tars(tmp_path, seed):
    """A change of one to three bytes: the same members, or the same error, as with tarfile."""
    rng = np.random.default_rng(seed)
    format = FORMATS[seed % 3]
    files = [(f"{number}/{'n' * int(rng.integers(150))}.jpg", rng.bytes(300)) for number in range(6)]
    if format == tarfile.USTAR_FORMAT:
        files = [(name[:90], data) for name, data in files]
    good = tar_bytes(files, format)
    headers = [at for at in range(0, len(good), 512) if good[at + 257 : at + 262] == b"ustar"]
    for number in range(25):
        changed = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            start = int(rng.choice(headers))
            changed[start + int(rng.integers(512))] = int(rng.integers(256))
            if rng.integers(2):
                changed[start + 148 : start + 156] = b" " * 8
                changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
        path = tmp_path / f"{number}.tar"
        path.write_bytes(changed[: int(rng.integers(len(changed)))] if rng.integers(10) == 0 else changed)
        fast, slow = both(path)
        # tarfile also parses mode, owner and time. The fast reader does not look at them, and may read further.
        assert fast == slow or (isinstance(slow, str) and "header)" in slow)


def test_reading_a_member(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes([("a", b"12345"), ("b", bytes(100_000)), ("c", b"67")]))
    with path.open("rb", buffering=0) as file:
        members = TarMembers(TarWindow(file.fileno(), 0, os.fstat(file.fileno()).st_size), "t.tar")
        assert [members.read(member, 4) for member in members] == [b"1234", bytes(4), b"67"]
        found = list(TarMembers(TarWindow(file.fileno(), 0, os.fstat(file.fileno()).st_size), "t.tar"))
        assert [members.read(member, 200_000) for member in found] == [b"12345", bytes(100_000), b"67"]
