"""Removes the metadata of an image file, so that only the parts that pixels need reach Pillow.

Otherwise damaged or huge comments, profiles and EXIF data would make the image unreadable, although none of it is
stored. Each format has a function that copies the parts that pixels need. Damage within them is copied too, and the
decoder detects it. With `orientation`, the parts that may hold the EXIF orientation are kept as well.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from sdpnet.pipelines.errors import ImageFileError
from sdpnet.pipelines.images.jp2_colours import boxes
from sdpnet.pipelines.images.jpeg_frame import segments
from sdpnet.pipelines.images.reasons import damaged
from sdpnet.pipelines.images.tiff_directory import only_pixel_tags

__all__ = ["without_metadata"]


def without_metadata(data: bytes, format: str, orientation: bool = False) -> bytes:
    """Returns a file with the same pixels and without metadata.

    Args:
        data: the whole file.
        format: Pillow's name of the format. Formats whose metadata is harmless are returned unchanged.
        orientation: whether to keep the parts that may hold the EXIF orientation.

    Raises:
        ImageFileError: the checksums of a PNG image show damaged pixels, or a needed part of it is missing.
    """
    strip = _STRIPPERS.get(format)
    return data if strip is None else strip(data, orientation)


# ---- PNG

_PNG_START: Final = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS: Final = (b"IHDR", b"PLTE", b"IDAT")
# eXIf is EXIF data itself. The text chunks hold EXIF data or XMP if their keyword says so.
_PNG_EXIF: Final = (b"eXIf", b"zTXt", b"tEXt", b"iTXt")
_PNG_KEYWORDS: Final = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_PNG_OF_PALETTE: Final = b"\x03"  # IHDR's colour type
_INFLATE_BYTES: Final = 1 << 20


def _strip_png(data: bytes, orientation: bool) -> bytes:
    """Keeps IHDR, PLTE and IDAT. Transparency is removed too, because decoding drops it anyway."""
    kept: dict[bytes, list[bytes]] = {name: [] for name in (*_PNG_PIXELS, b"exif")}
    doubtful = False
    for name, body, is_sound in _png_chunks(data):
        if name in _PNG_PIXELS:
            if not is_sound and name != b"IDAT":
                raise damaged(f"the checksum of its {name.decode()} chunk is wrong")
            doubtful |= not is_sound
            kept[name].append(body)
        elif orientation and is_sound and (name == b"eXIf" or (name in _PNG_EXIF and body.startswith(_PNG_KEYWORDS))):
            kept[b"exif"].append(_png_chunk(name, body))
        elif name == b"CgBI":
            raise ImageFileError("a PNG image in Apple's form for iOS, which is not read: convert it to plain PNG")
    if not kept[b"IHDR"]:
        raise damaged("its header chunk, IHDR, is missing")
    if kept[b"IHDR"][0][9:10] == _PNG_OF_PALETTE and not kept[b"PLTE"]:  # Pillow would make it black
        raise damaged("its palette chunk, PLTE, is missing")
    if doubtful and not _inflates(kept[b"IDAT"]):
        raise damaged("the checksum of an IDAT chunk is wrong, and so is that of the pixels")
    parts = [_png_chunk(b"IHDR", body) for body in kept[b"IHDR"][:1]] + kept[b"exif"]
    parts += [_png_chunk(b"PLTE", body) for body in kept[b"PLTE"][:1]]
    parts += [_png_chunk(b"IDAT", body) for body in kept[b"IDAT"]]
    return b"".join((_PNG_START, *parts, _png_chunk(b"IEND", b"")))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Yields each chunk's name, its content and whether its checksum is right.

    It stops at IEND, at the file's end, or at bytes that are no chunk. The last chunk may be cut off.
    """
    at = len(_PNG_START)
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name == b"IEND" or not name.isalpha():
            return
        body = data[at + 8 : at + 8 + size]
        checksum = data[at + 8 + size : at + 12 + size]
        # A checksum that is cut off counts as right: the decoder finds out whether pixels are missing.
        yield name, body, len(checksum) < 4 or zlib.crc32(body, zlib.crc32(name)) == int.from_bytes(checksum, "big")
        at += 12 + size


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))


def _inflates(bodies: list[bytes]) -> bool:
    """Whether the compressed pixels are complete and match zlib's checksum, so that only PNG's checksum was damaged."""
    stream = zlib.decompressobj()
    try:
        for body in bodies:
            while body and not stream.eof:
                stream.decompress(body, _INFLATE_BYTES)
                body = stream.unconsumed_tail
    except zlib.error:
        return False
    return stream.eof


# ---- JPEG


def _strip_jpeg(data: bytes, orientation: bool) -> bytes:
    """Removes comments and application segments, except those that decide the colours (JFIF, Adobe)."""
    parts = [data[:2]]
    for marker, start, end in segments(data):
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if (
            not is_metadata
            or _defines_colours(marker, data[start + 4 : min(end, start + 16)])
            or (orientation and marker == 0xE1)
        ):
            parts.append(data[start:end])
    return b"".join(parts)


def _defines_colours(marker: int, body: bytes) -> bool:
    """Whether libjpeg takes the colours from a segment. It ignores shorter ones, which are errors for Pillow."""
    return (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 12) or (
        marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
    )


# ---- WebP

_WEBP_PIXELS: Final = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_WEBP_EXIF: Final = (b"EXIF", b"XMP ")
_VP8X_METADATA: Final = 0x20 | 0x08 | 0x04  # flags: ICC profile, EXIF, XMP


def _strip_webp(data: bytes, orientation: bool) -> bytes:
    wanted = _WEBP_PIXELS + (_WEBP_EXIF if orientation else ())
    parts, at = [], 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        end = at + 8 + size + (size & 1)
        if name == b"VP8X" and not orientation and size >= 1:
            flags = bytes([data[at + 8] & ~_VP8X_METADATA]) if at + 8 < len(data) else b""
            parts.append(data[at : at + 8] + flags + data[at + 9 : end])
        elif name in wanted:
            parts.append(data[at:end])
        at = end
    content = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(content)) + content


# ---- GIF


def _strip_gif(data: bytes, orientation: bool) -> bytes:
    """Removes comments and application data before the first frame.

    Pillow joins a comment's blocks one by one, in time that grows with the square of their number.
    """
    at = 13 + _colours_size(data[10:11])
    parts = [data[:at]]
    while data[at : at + 1] == b"!":
        end = at + 2
        while end < len(data) and data[end]:
            end += 1 + data[end]
        end += 1
        label, name = data[at + 1 : at + 2], data[at + 3 : at + 14]
        if label == b"\xf9" or (orientation and name == b"XMP DataXMP"):  # F9 describes how the frame is shown
            parts.append(data[at:end])
        at = end
    return b"".join((*parts, data[at:]))


def _colours_size(flags: bytes) -> int:
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


# ---- AVIF


def _strip_avif(data: bytes, orientation: bool) -> bytes:
    """Gives EXIF and XMP items types that no decoder knows.

    The orientation does not depend on them: an AVIF image has properties of its own for it, which Pillow reports as the
    EXIF orientation.
    """
    for name, start, stop in boxes(data):
        if name != b"meta":
            continue
        content, parts, end = data[start + 4 : stop], [data[: start + 4]], 0
        for child, first, last in boxes(content):
            if child == b"iinf":
                items = content[first:last].replace(b"Exif", b"skip").replace(b"mime", b"skip")
                parts.append(content[end:first] + items)
            elif child == b"iprp":
                parts.append(_with_one_association(content[end:last]))
            else:
                parts.append(content[end:last])
            end = last
        return b"".join((*parts, content[end:], data[stop:]))
    return data


def _with_one_association(properties: bytes) -> bytes:
    """A property box of the same size in which all lists of associated items are merged into one.

    Some programs write one list per item, which libavif refuses.
    """
    found = [(name, properties[8:][start:stop]) for name, start, stop in boxes(properties[8:])]
    lists = [body for name, body in found if name == b"ipma"]
    if len(lists) < 2 or len({body[:4] for body in lists}) > 1 or min(map(len, lists)) < 8:
        return properties
    count = sum(int.from_bytes(body[4:8], "big") for body in lists)
    merged = lists[0][:4] + struct.pack(">I", count) + b"".join(body[8:] for body in lists)
    others = b"".join(_box(name, body) for name, body in found if name != b"ipma")
    box = _box(b"iprp", others + _box(b"ipma", merged))
    padding = len(properties) - len(box)
    return box + _box(b"free", bytes(padding - 8)) if padding >= 8 else properties


# ---- JPEG 2000

_JP2_PIXELS: Final = (b"ihdr", b"bpcc")
_ENUMERATED, _SRGB, _GREY = 1, 16, 17  # METH and EnumCS of a colour box


def _strip_jp2(data: bytes, orientation: bool) -> bytes:
    """Removes resolutions, UUIDs, XML and colour profiles, and also palettes and channel definitions.

    `sdpnet.pipelines.images.jp2_colours` reads the last two from the original file.
    """
    if not data.startswith(b"\0\0\0\x0cjP"):
        return data
    parts = [data[:12]]
    for name, start, stop in boxes(data):
        if name == b"jp2c":
            return b"".join((*parts, struct.pack(">I4s", 0, b"jp2c"), data[start:stop]))
        if name == b"jp2h":
            parts.append(_box(b"jp2h", _jp2_header(data[start:stop])))
        elif name == b"ftyp":
            parts.append(_box(b"ftyp", data[start:stop]))
    return data


def _jp2_header(header: bytes) -> bytes:
    found = [(name, header[start:stop]) for name, start, stop in boxes(header)]
    kept = b"".join(_box(name, body) for name, body in found if name in _JP2_PIXELS)
    colours = [body[:7] for name, body in found if name == b"colr" and body[:1] == bytes([_ENUMERATED])]
    channels = next((int.from_bytes(body[8:10], "big") for name, body in found if name == b"ihdr"), 3)
    plain = struct.pack(">BBBI", _ENUMERATED, 0, 0, _SRGB if channels >= 3 else _GREY)
    return kept + _box(b"colr", colours[0] if colours and channels >= 3 else plain)


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body


_STRIPPERS: Final[dict[str, Callable[[bytes, bool], bytes]]] = {
    "PNG": _strip_png,
    "JPEG": _strip_jpeg,
    "WEBP": _strip_webp,
    "GIF": _strip_gif,
    "AVIF": _strip_avif,
    "JPEG2000": _strip_jp2,
    "TIFF": lambda data, orientation: only_pixel_tags(data),
}
