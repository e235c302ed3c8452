"""Looks at an image without decoding it: its size in pixels, and whether the readers of shards can take it as it is.

    where it lies -> the first bytes, up to the frame header of a JPEG -> Seen

A file is read in pieces of 4 KiB; few have more before the frame header.
"""

from __future__ import annotations

import os
from enum import IntEnum
from struct import unpack_from
from typing import Final, NamedTuple

from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file
from sdpnet.pipelines.images.jpeg_frame import Frame, frame_of
from sdpnet.pipelines.images.kinds import MAX_PIXELS

__all__ = ["LARGEST", "Look", "Opened", "Seen", "State", "look_at"]

LARGEST: Final = (1 << 32) - 1  # bytes of an image in an index
_PIECE: Final = 4096
_MAX_SIDE: Final = 65_500  # libjpeg's limit
_MAX_PIXELS_PER_BYTE: Final = 512  # that of the index, which has the reason
_FRAMES: Final = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, with Huffman codes
_EXIF: Final = b"Exif\0"


class State(IntEnum):
    """What can be done with an image."""

    AS_IT_IS = 1
    NOT_AS_IT_IS = 2  # another format, unusual coding, damaged, or not an image: the converter decides


class Look(NamedTuple):
    """What is looked at besides the header.

    Attributes:
        checksums: read the whole image and compute its CRC-32.
        decode: decode the whole image.
        exif: "apply": an image that must be turned upright cannot be taken as it is.
    """

    checksums: bool = False
    decode: bool = False
    exif: str = "ignore"


class Seen(NamedTuple):
    """What was found: the size and modification time of the file, and of the image size, CRC-32, height and width."""

    file_size: int
    mtime_ns: int
    size: int
    crc32: int
    height: int
    width: int
    state: State


class Opened:
    """Keeps the file open that was used last: the images of a tar follow each other."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._descriptor = -1
        self._status: os.stat_result | None = None

    def open(self, path: str) -> tuple[int, os.stat_result]:
        """The descriptor and the status of a regular file. Raises `OSError` and `NotRegularError`."""
        if path != self._path or self._status is None:
            self.close()
            self._descriptor = open_regular_file(path)
            self._path, self._status = path, os.fstat(self._descriptor)
        return self._descriptor, self._status

    def close(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)
            self._path = self._status = None


def look_at(opened: Opened, path: str, offset: int, size: int | None, look: Look) -> Seen:
    """Looks at one image. `size` is None for an image that is the whole file."""
    try:
        descriptor, status = opened.open(path)
        length = status.st_size if size is None else size
        usable, height, width = _header(descriptor, offset, length, look)
        crc32 = 0
        if usable and (look.checksums or look.decode):
            usable, crc32 = _whole(descriptor, offset, length, height, width, look)
    except (OSError, NotRegularError, ValueError):
        return Seen(0, 0, 0, 0, 0, 0, State.NOT_AS_IT_IS)
    state = State.AS_IT_IS if usable else State.NOT_AS_IT_IS
    if not usable:
        height = width = 0
    return Seen(status.st_size, status.st_mtime_ns, length, crc32, height, width, state)


def _header(descriptor: int, offset: int, size: int, look: Look) -> tuple[bool, int, int]:
    """Whether an image can be taken as it is by its header, and its height and width."""
    frame = _frame(descriptor, offset, size, exif=look.exif == "apply")
    if frame is None or not (0 < frame.height <= _MAX_SIDE and 0 < frame.width <= _MAX_SIDE) or size > LARGEST:
        return False, 0, 0
    pixels = frame.height * frame.width
    usable = (
        frame.marker in _FRAMES
        and frame.bits == 8
        and frame.components in (1, 3)
        and pixels <= MAX_PIXELS
        and pixels <= size * _MAX_PIXELS_PER_BYTE
    )
    return usable, frame.height, frame.width


def _frame(descriptor: int, offset: int, size: int, *, exif: bool) -> Frame | None:
    """The frame header of a JPEG; None for other files. With `exif`, also for JPEGs that are not upright."""
    head = os.pread(descriptor, min(_PIECE, size), offset)
    if head[:3] != b"\xff\xd8\xff":
        return None
    base, at = 0, 2
    while True:
        start = at - base
        if start + 10 > len(head):  # the next segment may lie far behind this piece
            head = os.pread(descriptor, max(0, min(_PIECE, size - at)), offset + at)
            base, start = at, 0
            if len(head) < 10:
                return None
        if head[start] != 0xFF:
            return _unusual_frame(descriptor, offset, size, exif=exif)
        marker = head[start + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return Frame(marker, *unpack_from(">BHHB", head, start + 4))
        if marker in (0xD9, 0xDA):
            return None
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8 or marker == 0xFF:
            return _unusual_frame(descriptor, offset, size, exif=exif)
        if exif and marker == 0xE1 and head.startswith(_EXIF, start + 4):
            return _unusual_frame(descriptor, offset, size, exif=exif)
        at += 2 + (head[start + 2] << 8 | head[start + 3])


def _unusual_frame(descriptor: int, offset: int, size: int, *, exif: bool) -> Frame | None:
    """The same, from the whole file."""
    data = _read(descriptor, offset, size)
    if exif:
        from sdpnet.pipelines.images.file import is_upright

        if not is_upright(data):
            return None
    return frame_of(data)


def _whole(descriptor: int, offset: int, size: int, height: int, width: int, look: Look) -> tuple[bool, int]:
    """Whether the image can be decoded, if that is to be tried, and its CRC-32."""
    from zlib_ng import zlib_ng

    data = _read(descriptor, offset, size)
    if look.decode:
        import numpy as np

        from sdpnet.pipelines.images.strict_jpeg import DamagedJpegError, decode_jpeg

        try:
            decode_jpeg(np.frombuffer(data, np.uint8), height, width)
        except (DamagedJpegError, MemoryError):
            return False, 0
    return True, zlib_ng.crc32(data)


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """Reads a whole image. Raises `ValueError` if it is not complete."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise ValueError("incomplete")
        data += more
    return data
