"""Reads the kind of a JPEG from its frame header, to choose a decoder and to give true reasons in messages."""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["Frame", "frame_of", "segments"]

_WITHOUT_CONTENT = {0x01, *range(0xD0, 0xD9)}
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # from C0 to CF, but not frames: Huffman tables, reserved, arithmetic conditioning


class Frame(NamedTuple):
    """A frame header: its marker (C0 to CF), the bits per sample, the size in pixels and the number of components."""

    marker: int
    bits: int
    height: int
    width: int
    components: int

    @property
    def is_common(self) -> bool:
        """Whether every decoder supports it: baseline, extended or progressive, with Huffman codes and 8 bits."""
        return self.marker <= 0xC2 and self.bits == 8 and self.components in (1, 3, 4)

    @property
    def is_hierarchical(self) -> bool:
        """Whether its frames refine each other, which libjpeg does not support."""
        return 0xC5 <= self.marker <= 0xC7 or self.marker >= 0xCD

    @property
    def coding(self) -> str:
        """The kind of JPEG in words, such as "a 12-bit JPEG", or "a JPEG" if nothing is unusual."""
        if self.is_hierarchical:
            kind = "hierarchical JPEG"
        elif self.marker in (0xC3, 0xCB):
            kind = "lossless JPEG"
        elif self.marker in (0xC9, 0xCA):
            kind = "arithmetic-coded JPEG"
        else:
            kind = "JPEG"
        if self.bits != 8:
            return f"{'an 11' if self.bits == 11 else f'a {self.bits}'}-bit {kind}"
        name = f"{'an' if kind[0] == 'a' else 'a'} {kind}"
        return name if self.components in (1, 3, 4) else f"{name} of {self.components} components"


def frame_of(data: bytes) -> Frame | None:
    """The first frame header, or None if there is none before the first scan."""
    for marker, start, end in segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            return Frame(marker, *struct.unpack_from(">BHHB", data, start + 4)) if end - start >= 10 else None
    return None


def segments(data: bytes) -> list[tuple[int, int, int]]:
    """The segments of a JPEG file up to the first scan: (marker, start, end) of each.

    The first scan is the last entry and ends with the file. Extraneous bytes between segments, which libjpeg skips too,
    belong to none. A segment that is cut off ends with the file.
    """
    found: list[tuple[int, int, int]] = []
    at = 2
    while (start := data.find(b"\xff", at)) >= 0 and start + 4 <= len(data):
        marker = data[start + 1]
        if marker == 0xFF:  # padding
            at = start + 1
        elif marker == 0 or marker in _WITHOUT_CONTENT:
            at = start + 2
        else:
            at = start + 2 + struct.unpack_from(">H", data, start + 2)[0]
            if marker in (0xD9, 0xDA) or at < start + 4:
                found.append((marker, start, len(data)))
                break
            found.append((marker, start, min(at, len(data))))
    return found
