from __future__ import annotations

import struct

import numpy as np
import pytest
from image_files import file_bytes
from jpeg_files import make_image
from PIL import Image

from sdpnet.pipelines.errors import ImageFileError
from sdpnet.pipelines.images.file import decode_image
from sdpnet.pipelines.images.jp2_colours import palette_of, rgb_order

INDICES = np.arange(24, dtype=np.uint8).reshape(4, 6) % 8
COLOURS = np.random.default_rng(1).integers(0, 256, (8, 3), dtype=np.uint8)
COLOURS[:3] = 7  # repeated, which Pillow drops


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body


def definitions(*colours: int) -> bytes:
    return box(
        b"cdef",
        struct.pack(">H", len(colours))
        + b"".join(struct.pack(">HHH", channel, int(colour == 0), colour) for channel, colour in enumerate(colours)),
    )


def jp2_with(pixels: np.ndarray, *boxes: bytes) -> bytes:
    """A JPEG 2000 file of these pixels, with more boxes in its header."""
    data = file_bytes(pixels, "JPEG2000")
    start = data.index(b"jp2h") - 4
    end = start + struct.unpack_from(">I", data, start)[0]
    return data[:start] + box(b"jp2h", data[start + 8 : end] + b"".join(boxes)) + data[end:]


def palette(entries: np.ndarray, bits: int = 8) -> bytes:
    count, channels = entries.shape
    content = entries.astype(">u1" if bits <= 8 else ">u2").tobytes()
    return box(b"pclr", struct.pack(">HB", count, channels) + bytes([bits - 1]) * channels + content)


def mapping(*columns: int) -> bytes:
    return box(b"cmap", b"".join(struct.pack(">HBB", 0, 1, column) for column in columns))


def test_a_palette_may_repeat_colours() -> None:
    data = jp2_with(INDICES, palette(COLOURS), mapping(0, 1, 2))
    assert np.array_equal(decode_image(data), COLOURS[INDICES])
    assert palette_of(file_bytes(INDICES, "JPEG2000")) is None


def test_the_order_of_the_channels_is_the_files() -> None:
    data = jp2_with(INDICES, palette(COLOURS), mapping(0, 1, 2), definitions(2, 3, 1))
    assert np.array_equal(decode_image(data), COLOURS[INDICES][..., [2, 0, 1]])
    data = jp2_with(INDICES, palette(COLOURS), mapping(2, 1, 0))
    assert np.array_equal(decode_image(data), COLOURS[INDICES][..., ::-1])
    picture = make_image(3, 20, 30)
    stored = jp2_with(picture, definitions(3, 2, 1))
    assert np.array_equal(decode_image(stored), decode_image(file_bytes(picture, "JPEG2000"))[..., ::-1])
    assert rgb_order(stored, 3) == [2, 1, 0] and rgb_order(file_bytes(picture, "JPEG2000"), 3) in (None, [0, 1, 2])


def test_luma_and_chroma_in_another_order() -> None:
    """Cr, Cb, Y in the file: Pillow takes them for Y, Cb, Cr."""
    picture = Image.fromarray(make_image(4, 20, 30)).convert("YCbCr")
    stored = np.asarray(picture)[..., ::-1]
    ycc = jp2_with(np.ascontiguousarray(stored), definitions(3, 2, 1))
    place = ycc.index(b"colr") + 7
    ycc = ycc[:place] + struct.pack(">I", 18) + ycc[place + 4 :]
    difference = np.abs(decode_image(ycc).astype(int) - np.asarray(picture.convert("RGB")))
    assert difference.max() <= 2  # lossless, but for the wavelets' own rounding


def test_a_deep_palette_is_scaled() -> None:
    deep = COLOURS.astype(np.uint16) * 257
    assert np.array_equal(decode_image(jp2_with(INDICES, palette(deep, 16), mapping(0, 1, 2))), COLOURS[INDICES])
    grey = jp2_with(INDICES, palette(COLOURS[:, :1]), mapping(0))
    assert np.array_equal(decode_image(grey), COLOURS[:, :1].repeat(3, axis=1)[INDICES])


@pytest.mark.parametrize("body", [b"", b"\0\0\3\7\7\7", b"\0\x08\0", b"\0\x08\3\7\7\7" + bytes(5), b"\0\x08\3\x7f\7\7"])
def test_a_damaged_palette_is_an_error(body: bytes) -> None:
    data = jp2_with(INDICES, box(b"pclr", body), mapping(0, 1, 2))
    with pytest.raises(ValueError, match="its palette is"):
        palette_of(data)
    with pytest.raises(ImageFileError, match=r"^damaged image"):
        decode_image(data)
