"""Image files for the tests, in all formats that are decoded and with any metadata."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

__all__ = [
    "file_bytes",
    "gif_with",
    "jpeg_with",
    "png_chunk",
    "png_chunks",
    "png_of",
    "png_with",
    "tiff_with",
    "webp_with",
]


def file_bytes(image: Image.Image | np.ndarray, format: str = "PNG", **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents of a PNG file's chunks."""
    at, found = 8, []
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        found.append((name, data[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


def png_of(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_with(data: bytes, *extra: bytes) -> bytes:
    """A PNG file with more chunks (`png_chunk`) after its header."""
    end = 8 + 25
    return data[:end] + b"".join(extra) + data[end:]


def jpeg_with(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG file with more segments (marker, content) at its start."""
    extra = b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return data[:2] + extra + data[2:]


def webp_with(data: bytes, size: tuple[int, int], flags: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Makes an extended WebP file from a simple one, with more chunks after its pixels; `size` is (width, height)."""
    header = struct.pack("<I", flags) + b"".join((side - 1).to_bytes(3, "little") for side in size)
    parts = [(b"VP8X", header), (data[12:16], data[20 : 20 + struct.unpack_from("<I", data, 16)[0]]), *chunks]
    body = b"WEBP" + b"".join(n + struct.pack("<I", len(b)) + b + b"\0" * (len(b) & 1) for n, b in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_with(data: bytes, *extensions: bytes) -> bytes:
    """A GIF file with more extensions before its first frame."""
    end = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    return data[:end] + b"".join(extensions) + data[end:]


def tiff_with(data: bytes, *tags: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF file with more tags (number, type, count, value or offset) in its first directory."""
    (offset,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, offset)
    entries = [data[at : at + 12] for at in range(offset + 2, offset + 2 + 12 * count, 12)]
    replaced = {tag for tag, *_ in tags}
    entries = [entry for entry in entries if struct.unpack("<H", entry[:2])[0] not in replaced]
    entries += [struct.pack("<HHII", *tag) for tag in tags]
    entries.sort(key=lambda entry: struct.unpack("<H", entry[:2])[0])
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    padding = b"\0" * (len(data) % 2)
    return data[:4] + struct.pack("<I", len(data) + len(padding)) + data[8:] + padding + directory
