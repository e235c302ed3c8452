"""Reads what a JPEG 2000 file declares about its colours and Pillow ignores: its palette and the order of its channels.

Pillow drops repeated colours of a palette, so that all later ones get a wrong index, and takes the channels in the
order in which they are stored. Source: ISO/IEC 15444-1, annex I.5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

__all__ = ["bits_of", "boxes", "palette_of", "rgb_order", "with_ycc_as_rgb"]

_SRGB, _SYCC = struct.pack(">I", 16), struct.pack(">I", 18)  # EnumCS of the colour box
_CODESTREAM = b"\xff\x4f\xff\x51"  # the markers SOC and SIZ


def palette_of(data: bytes) -> np.ndarray | None:
    """The palette of a JP2 file: RGB, uint8 (n, 3). None if its samples are colours themselves.

    Raises `ValueError` for a damaged palette.
    """
    header = _header(data)
    body = header.get(b"pclr")
    if body is None:
        return None
    if len(body) < 3:
        raise ValueError("its palette is cut off")
    count, channels = struct.unpack_from(">HB", body)
    depths = [(depth & 0x7F) + 1 for depth in body[3 : 3 + channels]]
    entry = np.dtype([(f"c{i}", ">u1" if depth <= 8 else ">u2") for i, depth in enumerate(depths)])
    if not count or not channels or max(depths) > 16 or len(body) < 3 + channels + count * entry.itemsize:
        raise ValueError("its palette is damaged")
    entries = np.frombuffer(body, entry, count, 3 + channels)
    columns = [
        (entries[f"c{i}"].astype(np.int64) * 255 + ((1 << depth) - 1) // 2) // ((1 << depth) - 1)
        for i, depth in enumerate(depths)
    ]
    mapping = header.get(b"cmap", b"")
    mapped = [mapping[at + 3] for at in range(0, len(mapping) - 3, 4)] or list(range(channels))
    if max(mapped) >= channels:
        raise ValueError("its palette's channels are damaged")
    order = _order(header, len(mapped)) or (range(3) if len(mapped) >= 3 else [0, 0, 0])
    return np.stack([columns[mapped[channel]] for channel in order], axis=1).clip(0, 255).astype(np.uint8)


def rgb_order(data: bytes, channels: int) -> list[int] | None:
    """The numbers of a JP2 file's red, green and blue channels, or None if it does not declare them."""
    return _order(_header(data), channels)


def bits_of(data: bytes) -> list[int]:
    """The number of bits of each channel's samples, from the codestream's header; empty if that is damaged."""
    start = data.find(_CODESTREAM)
    if start < 0 or len(data) < start + 42:
        return []
    (channels,) = struct.unpack_from(">H", data, start + 40)
    return [(bits & 0x7F) + 1 for bits in data[start + 42 : start + 42 + 3 * channels : 3]]


def with_ycc_as_rgb(data: bytes) -> bytes | None:
    """A copy of a file in Y, Cb and Cr that declares them as red, green and blue; None for other files.

    The caller converts the colours itself.
    """
    box = _header(data).get(b"colr", b"")
    place = data.find(b"colr" + box) + 4 + 3
    if box[:1] != b"\1" or box[3:7] != _SYCC:
        return None
    return data[:place] + _SRGB + data[place + 4 :]


def _order(header: dict[bytes, bytes], channels: int) -> list[int] | None:
    definitions = header.get(b"cdef", b"")
    found = {}
    for at in range(2, len(definitions) - 5, 6):
        channel, kind, colour = struct.unpack_from(">HHH", definitions, at)
        if kind == 0 and channel < channels:
            found[colour] = channel
    return [found[1], found[2], found[3]] if {1, 2, 3} <= found.keys() else None


def _header(data: bytes) -> dict[bytes, bytes]:
    """The boxes of the JP2 header by name; empty for a bare codestream."""
    for name, start, stop in boxes(data):
        if name == b"jp2h":
            header = data[start:stop]
            return {name: header[start:stop] for name, start, stop in boxes(header)}
        if name == b"jp2c":
            break
    return {}


def boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields the name, start and stop of each box; the positions are those of the box's content."""
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if size == 1 and at + 16 <= len(data):
            size, start = struct.unpack_from(">Q", data, at + 8)[0], at + 16
        at = len(data) if size == 0 else at + size
        if at < start:
            return
        yield name, start, min(at, len(data))
