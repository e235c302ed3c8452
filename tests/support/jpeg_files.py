"""JPEG files for the tests, written by Pillow or of kinds that Pillow does not write."""

from __future__ import annotations

import io
import itertools
import struct

import numpy as np
from PIL import Image

__all__ = [
    "decoded",
    "joined",
    "make_image",
    "markers",
    "pillow_jpeg",
    "planes_in_scans",
    "replace_segment",
    "segments",
]


def make_image(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random image with some grain: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


def pillow_jpeg(pixels: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """The image as Pillow decodes it: uint8 (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def segments(jpeg: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The marker segments up to that of the first scan, as (marker, body), and the entropy-coded rest."""
    assert jpeg[:2] == b"\xff\xd8"
    position, found = 2, []
    while True:
        prefix, marker, length = struct.unpack(">BBH", jpeg[position : position + 4])
        assert prefix == 0xFF
        found.append((marker, jpeg[position + 4 : position + 2 + length]))
        position += 2 + length
        if marker == 0xDA:
            return found, jpeg[position:]


def joined(found: list[tuple[int, bytes]], rest: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(struct.pack(">BBH", 0xFF, m, len(b) + 2) + b for m, b in found) + rest


def replace_segment(jpeg: bytes, old: int, new: int, body: bytes | None = None) -> bytes:
    """The file with the marker `old` replaced by `new` and, if given, its body replaced."""
    found, rest = segments(jpeg)
    assert old in dict(found)
    return joined([(new, body or b) if m == old else (m, b) for m, b in found], rest)


def markers(jpeg: bytes) -> list[int]:
    """All markers of a file with one scan, in order, including restart markers and the end."""
    found, rest = segments(jpeg)
    inside = [b for a, b in itertools.pairwise(rest) if a == 0xFF and b != 0]
    return [marker for marker, _ in found] + inside


def planes_in_scans(pixels: np.ndarray, scans: list[int]) -> bytes:
    """A sequential 4:4:4 JPEG with a scan for each entry of `scans` (a component from 1 to 3), of equal content."""
    found, rest = segments(pillow_jpeg(pixels, "L"))
    header = [(m, b) for m, b in found if m not in (0xC0, 0xDA)]
    frame = dict(found)[0xC0][:5] + bytes([3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    data = rest[: rest.rindex(b"\xff\xd9")]
    body = b"".join(b"\xff\xda\x00\x08\x01" + bytes([scan]) + b"\x00\x00\x3f\x00" + data for scan in scans)
    return joined([*header, (0xC0, frame)], body + b"\xff\xd9")
