"""Reads the first directory of a TIFF file, and rewrites it with only the tags that pixels need."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

__all__ = ["FLOAT", "SIGNED", "UNSIGNED", "TiffImage", "first_image", "only_pixel_tags"]

NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, SAMPLES_PER_PIXEL = 254, 258, 259, 262, 277
PLANAR_CONFIGURATION, SUB_IFDS, SAMPLE_FORMAT, DNG_VERSION = 284, 330, 339, 50706
# Size, strips, tiles, compression, colours, orientation (which Pillow always applies to TIFF), JPEG's tables.
PIXEL_TAGS: Final = frozenset(
    (256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334)
).union((336, 338, 339, 340, 341, 347, 529, 530, 531, 532, 0xBC01), range(512, 522))
_TYPE_BYTES: Final = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 16: 8, 17: 8}
_TYPE_CODES: Final = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}
_MAX_VALUES: Final = 16  # the number of values of a tag that are read at most
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # SampleFormat


_COMPRESSIONS: Final = {
    1: "no compression",
    2: "CCITT compression",
    3: "fax compression",
    4: "fax compression",
    5: "LZW compression",
    6: "old JPEG compression",
    7: "JPEG compression",
    8: "deflate compression",
    32773: "PackBits compression",
    32946: "deflate compression",
    34712: "JPEG 2000 compression",
    34887: "LERC compression",
    34925: "LZMA compression",
    50000: "Zstandard compression",
    50001: "WebP compression",
    50002: "JPEG XL compression",
}
_PHOTOMETRICS: Final = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
_COMMON: Final = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)  # compressions that every libtiff knows


@dataclass(frozen=True)
class TiffImage:
    """Properties of the first image of a TIFF file.

    Attributes:
        bits: the bits per sample; the largest number among the channels.
        format: the sample format: `UNSIGNED`, `SIGNED`, `FLOAT`, or another number of the TIFF specification.
        channels: the number of samples per pixel.
        photometric: the specification's number for the kind of colours.
        compression: the specification's number for the compression.
        is_planar: whether the channels are stored separately.
        is_big_endian: whether the most significant byte comes first.
        is_raw: whether the file is a camera's raw image, whose first image is a small preview.
        is_cut: whether the file ends before its directory does.
    """

    bits: int
    format: int
    channels: int
    photometric: int
    compression: int
    is_planar: bool
    is_big_endian: bool
    is_raw: bool
    is_cut: bool

    @property
    def white_is_zero(self) -> bool:
        """Whether level 0 is white."""
        return self.photometric == 0

    @property
    def is_unusual(self) -> bool:
        """Whether some builds of libtiff do not support the compression."""
        return self.compression not in _COMMON

    @property
    def description(self) -> str:
        """The image in words, such as "3 channels of 16 bits, RGB, LZW compression"."""
        channels = "1 channel" if self.channels == 1 else f"{self.channels} channels"
        colours = _PHOTOMETRICS.get(self.photometric, f"colours of number {self.photometric}")
        compression = _COMPRESSIONS.get(self.compression, f"compression of number {self.compression}")
        return f"{channels} of {self.bits} bit{'s' * (self.bits != 1)}, {colours}, {compression}"


@dataclass(frozen=True)
class _Directory:
    order: str  # the byte order, as `struct` names it
    is_big: bool
    is_cut: bool
    entries: list[tuple[int, bytes]]  # tags, and their entries as stored in the file

    def find(self, tag: int) -> bytes | None:
        return next((entry for number, entry in reversed(self.entries) if number == tag), None)


def first_image(data: bytes) -> TiffImage:
    """Reads the tags of a TIFF file. Values that cannot be read get the specification's defaults."""
    found = _read(data)

    def values(tag: int, default: int) -> tuple[int, ...]:
        return (_values(data, found, tag) if found is not None else ()) or (default,)

    def has(tag: int) -> bool:
        return found is not None and found.find(tag) is not None

    bits = values(BITS_PER_SAMPLE, 1)
    return TiffImage(
        bits=max(bits),
        format=max(values(SAMPLE_FORMAT, UNSIGNED)),
        channels=max(values(SAMPLES_PER_PIXEL, 1)[0], len(bits)),
        photometric=values(PHOTOMETRIC, 0)[0],
        compression=values(COMPRESSION, 1)[0],
        is_planar=values(PLANAR_CONFIGURATION, 1)[0] == 2,
        is_big_endian=data.startswith(b"MM"),
        is_raw=has(DNG_VERSION) or (has(SUB_IFDS) and bool(values(NEW_SUBFILE_TYPE, 0)[0] & 1)),
        is_cut=found is None or found.is_cut,
    )


def only_pixel_tags(data: bytes) -> bytes:
    """A copy of the file with a new directory at its end that has only `PIXEL_TAGS`.

    The file is returned unchanged if its directory cannot be read.
    """
    found = _read(data)
    if found is None:
        return data
    wanted = PIXEL_TAGS
    if (_values(data, found, SAMPLES_PER_PIXEL) or (1,))[0] == 1:
        wanted -= {PLANAR_CONFIGURATION}  # has no meaning for one channel, and confuses Pillow
    entries = [entry for tag, entry in found.entries if tag in wanted]
    padding = b"\0" * (-len(data) % 8)
    offset = len(data) + len(padding)
    if found.is_big:
        head = data[:8] + struct.pack(found.order + "Q", offset) + data[16:]
        count, end = struct.pack(found.order + "Q", len(entries)), bytes(8)
    else:
        if offset > 0xFFFF_FFFF:
            return data
        head = data[:4] + struct.pack(found.order + "I", offset) + data[8:]
        count, end = struct.pack(found.order + "H", len(entries)), bytes(4)
    return b"".join((head, padding, count, *entries, end))


def _read(data: bytes) -> _Directory | None:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    is_big = 43 in data[2:4]
    try:
        if is_big:
            (offset,) = struct.unpack_from(order + "Q", data, 8)
            (count,) = struct.unpack_from(order + "Q", data, offset)
            first, size = offset + 8, 20
        else:
            (offset,) = struct.unpack_from(order + "I", data, 4)
            (count,) = struct.unpack_from(order + "H", data, offset)
            first, size = offset + 2, 12
    except (struct.error, OverflowError):
        return None
    available = min((len(data) - first) // size, 0xFFFF)
    is_cut, count = count > available, min(count, available)
    places = range(first, first + count * size, size)
    entries = [(struct.unpack_from(order + "H", data, at)[0], data[at : at + size]) for at in places]
    return _Directory(order, is_big, is_cut, entries) if entries else None


def _values(data: bytes, found: _Directory, tag: int) -> tuple[int, ...]:
    """The first integers of a tag; empty if it is missing or damaged."""
    entry = found.find(tag)
    if entry is None:
        return ()
    _, kind, count = struct.unpack_from(found.order + ("HHQ" if found.is_big else "HHI"), entry)
    if kind not in _TYPE_CODES:
        return ()
    field = entry[12:] if found.is_big else entry[8:]
    if count * _TYPE_BYTES[kind] > len(field):
        (at,) = struct.unpack(found.order + ("Q" if found.is_big else "I"), field)
        field = data[at : at + _MAX_VALUES * _TYPE_BYTES[kind]] if at < len(data) else b""
    count = min(count, _MAX_VALUES, len(field) // _TYPE_BYTES[kind])
    return struct.unpack_from(f"{found.order}{count}{_TYPE_CODES[kind]}", field)
