"""Reads the headers of a tar archive: the names, positions and sizes of its files. Every entry is checked.

Ordinary headers (ustar and GNU, with at most PAX records of times before them) are parsed here, some hundred thousand a
second. Python's tarfile reads all others, ends the archive, and explains what is wrong with it.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from zlib import adler32

from sdpnet.pipelines.errors import UserError

__all__ = ["Member", "TarMembers", "TarWindow", "entries", "require_tar"]

COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}
UNSAFE_NAME: Final = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\x00-\x1f\x7f\\]")
FILE_TYPES: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
REFUSED_TYPES: Final = {
    tarfile.SYMTYPE: ("a symbolic link", "make the archive again with tar --dereference"),
    tarfile.LNKTYPE: ("a hard link", "make the archive again with tar --hard-dereference"),
    tarfile.CHRTYPE: ("a device", "make the archive again without it"),
    tarfile.BLKTYPE: ("a device", "make the archive again without it"),
    tarfile.FIFOTYPE: ("a named pipe", "make the archive again without it"),
}
MAX_HEADER: Final = 1 << 20  # bytes of a long name or PAX header; a file name has at most 4,096
MAX_PADDING: Final = 1 << 20  # zeros after the end mark; tar's default rounds up to 10,240 bytes
_BLOCK: Final = tarfile.BLOCKSIZE
_NEAR: Final = 1 << 14  # bytes; behind a file that is not larger, many headers are read at once
_READ_NEAR: Final = 1 << 16
_READ_FAR: Final = 1 << 13  # room for the labels behind a large image and the header of the next image
_TIMES: Final = re.compile(rb"([0-9]{1,3}) [amc]time=[0-9.]{1,30}\n")
_MODULUS: Final = 65_521  # of the sum of bytes in the lower half of an Adler-32


class Member(NamedTuple):
    """A regular file or a folder of an archive: its name and the position of its contents, in bytes."""

    name: str
    offset: int
    size: int
    is_folder: bool = False


class TarMembers:
    """The regular files and folders of an archive up to its end mark. Iterating raises the errors of `entries`.

    Args:
        window: the archive.
        name: its name in messages.
    """

    def __init__(self, window: TarWindow, name: str) -> None:
        self._window, self._name = window, name
        self._buffer, self._start = b"", -1  # what was read last, and its position

    def read(self, member: Member, max_bytes: int) -> bytes:
        """The first bytes of a member, at most `max_bytes`. Fast for a small member during its turn."""
        size = min(member.size, max_bytes)
        start = member.offset - self._start
        if start >= 0 and start + size <= len(self._buffer):
            return self._buffer[start : start + size]
        return os.pread(self._window.descriptor, size, member.offset)

    def __iter__(self) -> Iterator[Member]:
        window, end = self._window, self._window.end
        position = window.position
        far = True
        while True:
            start = position - self._start
            found = self._parse(start) if start >= 0 else None
            if found is None and start != 0:  # the headers go on behind what was read
                size = _READ_FAR if far else _READ_NEAR
                self._buffer = os.pread(window.descriptor, max(0, min(size, end - position)), position)
                self._start = position
                found = self._parse(0)
            if found is None:
                window.seek(position)
                for entry, after, has_globals in _checked(window, self._name):
                    yield Member(entry.name, entry.offset_data, entry.size, entry.isdir())
                    if not has_globals:  # PAX records that apply to all later entries, too
                        position = after
                        break
                else:
                    return
                continue
            member, position = found
            far = member.size > _NEAR
            yield member

    def _parse(self, start: int) -> tuple[Member, int] | None:
        """The member whose headers begin at `start` in the buffer, and the end of its contents.

        None for anything but an ordinary file or folder with harmless values and correct checksums.
        """
        buffer = self._buffer
        block = buffer[start : start + _BLOCK]
        kind = block[156:157]
        if kind == b"x":  # PAX records of the next header
            size = _size_of(block)
            records = start + _BLOCK
            if size is None or not _only_times(buffer[records : records + size], size):
                return None
            start = records + -(-size // _BLOCK) * _BLOCK
            block = buffer[start : start + _BLOCK]
            kind = block[156:157]
        if kind not in (b"0", b"\0", b"5"):
            return None
        size = _size_of(block)
        if size is None:
            return None
        raw = block[:100].partition(b"\0")[0]
        if block[345]:
            if block[257:263] != b"ustar\0":
                return None
            raw = block[345:500].partition(b"\0")[0] + b"/" + raw
        is_folder = kind == b"5"
        name = raw.decode("utf-8", "surrogateescape")
        if is_folder:
            name = name.rstrip("/")
        offset = self._start + start + _BLOCK
        after = offset + -(-size // _BLOCK) * _BLOCK
        if (is_folder and size) or (not is_folder and name.endswith("/")) or after > self._window.end:
            return None
        if not name or UNSAFE_NAME.search(name):
            return None
        return Member(name, offset, size, is_folder), after


def _size_of(block: bytes) -> int | None:
    """The size in a header; None unless it and the checksum are plain octal numbers and the checksum is correct."""
    if len(block) < _BLOCK or block[257:262] != b"ustar":
        return None
    size, checksum = block[124:135], block[148:154]
    if not (size.isdigit() and checksum.isdigit()) or block[135] not in b"\0 " or block[154] not in b"\0 ":
        return None
    try:
        value = int(checksum, 8)
        # The lower half of an Adler-32 is the sum of all bytes. Those of the checksum itself count as 8 spaces.
        if ((adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 256 - value) % _MODULUS:
            return None
        return int(size, 8)
    except ValueError:  # the digits 8 and 9
        return None


def _only_times(records: bytes, size: int) -> bool:
    """Whether PAX records of `size` bytes are complete and have nothing but times, which do not matter."""
    at = 0
    while at < size:
        found = _TIMES.match(records, at)
        if found is None or int(found[1]) != found.end() - at:
            return False
        at = found.end()
    return at == size == len(records)


class TarWindow:
    """A part of a file, with the methods that tarfile needs. Offsets are those of the whole file.

    A damaged or hostile header can announce a name of any length, and tarfile would read all of it into memory. `read`
    therefore refuses more than MAX_HEADER bytes.
    """

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self.descriptor, self.end = descriptor, start + size
        self.position = start

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data = os.pread(self.descriptor, max(0, min(size, self.end - self.position)), self.position)
        self.position += len(data)
        return data


def entries(window: TarWindow, name: str) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files and directories of an archive up to its end mark. Every entry is checked."""
    return (entry for entry, _, _ in _checked(window, name))


def _checked(window: TarWindow, name: str) -> Iterator[tuple[tarfile.TarInfo, int, bool]]:
    """Yields each entry, the end of its contents, and whether the archive has had global PAX records."""
    stop = window.position
    try:
        archive = tarfile.TarFile(fileobj=window)  # type: ignore[arg-type]
        for entry in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise all of them stay in memory
            _require_harmless(entry, name)
            is_file = entry.type in FILE_TYPES
            end = entry.offset_data + (-(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if is_file else 0)
            if entry.size < 0 or end != archive.offset or end <= stop:
                raise tarfile.ReadError(f"impossible size of {entry.name!r}")
            if end > window.end:
                raise _cut_off(name, f"{entry.name!r} goes on for {end - window.end:,} bytes after its end")
            stop = end
            yield entry, end, bool(archive.pax_headers)
        _require_end(window, stop, name)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except Exception as error:  # tarfile raises several types on damaged headers
        reason = " ".join(str(error).split()) or type(error).__name__
        if window.position >= window.end:
            raise _cut_off(name, f"the entry at byte {stop:,} is incomplete") from None
        raise UserError(f"{name}: damaged at byte {stop:,} ({reason}); copy or download it again") from None


def _require_end(window: TarWindow, stop: int, name: str) -> None:
    """Raises an error unless the archive ends at `stop`, with two blocks of zeros.

    tarfile stops at anything that is not a header, without an error, so that a truncated archive would look complete.
    """
    window.seek(stop)
    mark = window.read(2 * tarfile.BLOCKSIZE)
    if any(mark[: tarfile.BLOCKSIZE]) and len(mark) >= tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no header")
    if len(mark) < 2 * tarfile.BLOCKSIZE:
        raise _cut_off(name, "its end mark is missing")
    num_remaining = window.end - window.position
    if any(mark) or num_remaining > MAX_PADDING or any(window.read(num_remaining)):
        raise UserError(
            f"{name}: goes on after the end mark at byte {stop:,}; the download is incomplete (download it again), "
            "or several archives were joined (give them one by one)"
        )


def _cut_off(name: str, what: str) -> UserError:
    return UserError(f"{name}: cut off: {what}; copy or download it again")


def _require_harmless(entry: tarfile.TarInfo, name: str) -> None:
    """Raises `UserError` for an entry that is neither a regular file nor a folder, or that leads out of the archive."""
    if UNSAFE_NAME.search(entry.name):
        what, remedy = "not a plain relative name", "make the archive again with names of that kind"
    elif entry.issparse() or any(key.startswith("GNU.sparse") for key in entry.pax_headers):
        what, remedy = "a sparse file", "make the archive again without tar's --sparse"
    elif entry.type in FILE_TYPES or entry.isdir():
        return
    else:
        unknown = (f"an entry of the unknown type {entry.type!r}", "make the archive again without it")
        what, remedy = REFUSED_TYPES.get(entry.type, unknown)
    raise UserError(f"{name}: {entry.name!r} is {what}; {remedy}")


def require_tar(path: Path, block: bytes) -> None:
    """Raises `UserError` unless `block`, the first block of a file, is a tar header."""
    for magic, kind in COMPRESSED.items():
        if block.startswith(magic):
            raise UserError(
                f"{path}: compressed ({kind}); decompress it first: images are read in any order, which a compressed "
                "archive does not allow"
            )
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        pass  # an empty archive
    except tarfile.HeaderError:
        raise UserError(f"{path}: not a folder, nor a tar archive") from None
