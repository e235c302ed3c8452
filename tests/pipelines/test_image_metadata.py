"""Metadata never costs the image: pixels are those of the file without it. Damaged pixels stay an error."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from image_files import file_bytes, gif_with, jpeg_with, png_chunk, png_chunks, png_of, png_with, tiff_with, webp_with
from jpeg_files import make_image, pillow_jpeg, segments
from PIL import Image, UnidentifiedImageError

from sdpnet.pipelines.errors import ImageFileError
from sdpnet.pipelines.images import file as image_file
from sdpnet.pipelines.images.file import decode_image, is_upright
from sdpnet.pipelines.images.metadata import without_metadata
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image

PICTURE = make_image(2, 40, 50)
GARBAGE = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()
PNG, JPEG, GIF = file_bytes(PICTURE), pillow_jpeg(PICTURE), file_bytes(PICTURE, "GIF")
WEBP, TIFF, AVIF = file_bytes(PICTURE, "WEBP"), file_bytes(PICTURE, "TIFF"), file_bytes(PICTURE, "AVIF")


def blocks(content: bytes) -> bytes:
    """A GIF's data sub-blocks."""
    parts = [content[at : at + 255] for at in range(0, len(content), 255)]
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def exif_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


LARGE = zlib.compress(bytes(2_000_000))
PNGS = {
    "ztxt": png_chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "itxt": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "iccp": png_chunk(b"iCCP", b"icc\0\0" + LARGE),
    "iccp-garbage": png_chunk(b"iCCP", GARBAGE),
    "iccp-method": png_chunk(b"iCCP", b"icc\0\7" + LARGE),
    "ztxt-method": png_chunk(b"zTXt", b"Comment\0\7" + LARGE),
    "exif-garbage": png_chunk(b"eXIf", GARBAGE),
    "exif-hex": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n4\nzz")),
    "text-checksum": png_chunk(b"tEXt", b"Comment\0hello", checksum=1),
    "time-short": png_chunk(b"tIME", b"\7"),
    "phys-short": png_chunk(b"pHYs", b"\0\0"),
    "gama-short": png_chunk(b"gAMA", b""),
    "chrm-short": png_chunk(b"cHRM", b"\0"),
    "srgb-short": png_chunk(b"sRGB", b""),
    "trns-short": png_chunk(b"tRNS", b"\1"),
    "trns-checksum": png_chunk(b"tRNS", bytes(6), checksum=1),
    "animation": png_chunk(b"acTL", struct.pack(">II", 3, 0)) + png_chunk(b"fcTL", b"\0"),
    "private": png_chunk(b"prVt", GARBAGE, checksum=0),
}
SEGMENTS = {
    "jfif-empty": [(0xE0, b"")],
    "jfif-short": [(0xE0, b"JFIF\0")],
    "exif-empty": [(0xE1, b"Exif\0\0")],
    "exif-garbage": [(0xE1, b"Exif\0\0" + GARBAGE)],
    "exif-oversized": [(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(65_000))],
    "xmp-garbage": [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + GARBAGE)],
    "icc-garbage": [(0xE2, b"ICC_PROFILE\0" + GARBAGE)],
    "icc-empty": [(0xE2, b"ICC_PROFILE\0")],
    "icc-missing-part": [(0xE2, b"ICC_PROFILE\0\2\3" + GARBAGE)],
    "mpf-garbage": [(0xE2, b"MPF\0" + GARBAGE)],
    "photoshop-garbage": [(0xED, b"Photoshop 3.0\0008BIM" + GARBAGE)],
    "photoshop-short": [(0xED, b"Photoshop 3.0\0008BIM\4")],
    "adobe-short": [(0xEE, b"Adobe")],
    "many": [(0xE5, bytes(65_000))] * 200,
    "comments": [(0xFE, GARBAGE)] * 3,
}


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize("name", PNGS)
def test_png(name: str, exif: str) -> None:
    assert np.array_equal(decode_image(png_with(PNG, PNGS[name]), exif=exif), PICTURE)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("built", [True, False], ids=["native", "pillow"])
def test_jpeg(name: str, exif: str, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not built:
        monkeypatch.setattr(image_file, "native_is_built", lambda: False)
    data = jpeg_with(JPEG, *SEGMENTS[name])
    assert np.array_equal(decode_image(data, exif=exif), decode_image(JPEG))
    assert encode_image(data, EncodeSettings(exif=exif)) == encode_image(JPEG, EncodeSettings())


@pytest.mark.parametrize("exif", ["ignore", "apply"])
@pytest.mark.parametrize(
    ("data", "clean"),
    [
        (webp_with(WEBP, (50, 40), 0x2C, (b"ICCP", GARBAGE), (b"EXIF", GARBAGE), (b"XMP ", GARBAGE)), WEBP),
        (webp_with(WEBP, (50, 40), 0x2C), WEBP),
        (webp_with(WEBP, (50, 40), 0x08, (b"EXIF", b""))[:-8] + b"EXIF\xff\xff\0\0", WEBP),
        (gif_with(GIF, b"!\xfe" + blocks(bytes(200_000)), b"!\xff\x0bXMP DataXMP" + blocks(GARBAGE)), GIF),
        (gif_with(GIF, b"!\xff\x0bNETSCAPE2.0\0", b"!\xff\0", b"!\x01" + blocks(GARBAGE)), GIF),
        (tiff_with(TIFF, (34675, 7, 1 << 20, 1 << 30), (34665, 4, 1, 1 << 30), (700, 1, 900, 1 << 31)), TIFF),
        (tiff_with(TIFF, (282, 5, 1, 1 << 30), (283, 99, 1, 7), (270, 2, 0xFFFFFFFF, 8), (33723, 4, 9, 1)), TIFF),
    ],
    ids=["webp", "webp-flags-only", "webp-cut", "gif", "gif-odd", "tiff-profile-exif-xmp", "tiff-types"],
)
def test_other_formats(data: bytes, clean: bytes, exif: str) -> None:
    assert np.array_equal(decode_image(data, exif=exif), decode_image(clean))


def test_avif() -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    data = file_bytes(PICTURE, "AVIF", exif=exif, xmp=b"<x:xmpmeta/>" * 5)
    place = data.rindex(b"MM\0*") if b"MM\0*" in data else data.rindex(b"II*\0")
    damaged = data[:place] + b"\xff" * 8 + data[place + 8 :]
    with pytest.raises((SyntaxError, ValueError)):  # what Pillow makes of it
        Image.open(io.BytesIO(damaged), formats=["AVIF"])
    for choice in ("ignore", "apply"):
        assert np.array_equal(decode_image(damaged, exif=choice), decode_image(AVIF))


def test_an_avif_may_list_its_properties_in_parts() -> None:
    """As cavif writes: libavif, and so Pillow, refuses it."""
    image = Image.fromarray(PICTURE).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = file_bytes(image, "AVIF")
    start = data.index(b"ipma") - 4
    stop = start + struct.unpack_from(">I", data, start)[0]
    head, count = data[start + 8 : start + 12], struct.unpack_from(">I", data, start + 12)[0]
    entries, at = [], start + 16
    for _ in range(count):
        size = 3 + data[at + 2]
        entries.append(data[at : at + size])
        at += size
    assert at == stop and count == 2
    parts = b"".join(jp2_box(b"ipma", head + struct.pack(">I", 1) + entry) for entry in entries)
    more = len(parts) - (stop - start)
    changed = bytearray(data[:start] + parts + data[stop:])
    for name in (b"iprp", b"meta"):
        place = data.index(name) - 4
        changed[place : place + 4] = struct.pack(">I", struct.unpack_from(">I", data, place)[0] + more)
    place = data.index(b"iloc")  # version 0, offsets of 4 bytes: item, source, base of 0 bytes, count, offset, size
    assert data[place + 4 : place + 10] == b"\0\0\0\0\x44\0"
    for item in range(2):
        at = place + 12 + 14 * item + 6
        changed[at : at + 4] = struct.pack(">I", struct.unpack_from(">I", data, at)[0] + more)
    assert np.array_equal(decode_image(bytes(changed)), decode_image(data))
    with pytest.raises(UnidentifiedImageError):  # what Pillow makes of it
        Image.open(io.BytesIO(bytes(changed)), formats=["AVIF"])


def jp2_box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body


def test_jpeg_2000() -> None:
    data = file_bytes(PICTURE, "JPEG2000")
    start = data.index(b"jp2h") - 4
    stop = start + struct.unpack_from(">I", data, start)[0]
    uuid = jp2_box(b"uuid", GARBAGE[:17]) + jp2_box(b"xml ", GARBAGE) + struct.pack(">I4sQ", 1, b"uuid", 20) + bytes(4)
    header = data[start + 8 : stop]
    for colours in (b"\1\0\0\0\0\0\x10", b"\2\0\0" + GARBAGE, b"\2\0\0\0", b"\3\0\0"):
        place = header.index(b"colr") - 4
        odd = header[:place] + jp2_box(b"colr", colours) + jp2_box(b"res ", b"\0\0\0\x22resc")
        changed = data[:start] + uuid + jp2_box(b"jp2h", odd) + uuid + data[stop:]
        for exif in ("ignore", "apply"):
            assert np.array_equal(decode_image(changed, exif=exif), decode_image(data))


def test_orientation_is_found_beside_bad_metadata() -> None:
    exif, turned = exif_orientation(6), np.rot90(PICTURE, -1)
    bad = [PNGS[name] for name in ("ztxt", "iccp-garbage", "text-checksum", "gama-short")]
    for place in (
        png_with(PNG, *bad, png_chunk(b"eXIf", exif[6:])),
        png_of(*(png_chunk(*chunk) for chunk in [*png_chunks(PNG)[:-1], (b"eXIf", exif[6:]), (b"IEND", b"")])),
    ):
        assert np.array_equal(decode_image(place, exif="apply"), turned) and not is_upright(place)
        assert np.array_equal(decode_image(place), PICTURE)
    jpeg = jpeg_with(JPEG, *SEGMENTS["jfif-empty"], *SEGMENTS["icc-garbage"], (0xE1, exif))
    assert np.array_equal(decode_image(jpeg, exif="apply"), np.rot90(decode_image(JPEG), -1))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="3"/>'
    assert np.array_equal(decode_image(jpeg_with(JPEG, (0xE1, xmp)), exif="apply"), decode_image(JPEG)[::-1, ::-1])
    webp = webp_with(WEBP, (50, 40), 0x28, (b"ICCP", GARBAGE), (b"EXIF", exif[6:]))
    assert np.array_equal(decode_image(webp, exif="apply"), np.rot90(decode_image(WEBP), -1))


def test_memory_is_bounded() -> None:
    """70 MB of text in 70 KB."""
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000))) * 70
    exif = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(40_000_000)))
    data = png_with(PNG, text, exif)
    tracemalloc.start()
    try:
        decode_image(data, exif="apply")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


def test_colours_are_decided_as_before() -> None:
    """JFIF and Adobe markers say what the components are."""
    for mode, options in (("RGB", {"keep_rgb": True}), ("CMYK", {}), ("RGB", {}), ("L", {})):
        data = pillow_jpeg(PICTURE, mode, **options)
        kept = {marker for marker, _ in segments(without_metadata(data, "JPEG"))[0] if 0xE0 <= marker <= 0xEF}
        assert kept == {marker for marker, _ in segments(data)[0] if 0xE0 <= marker <= 0xEF}


# ---- damaged pixels


@pytest.mark.parametrize("seed", range(12))
def test_a_changed_bit_of_png_pixels_is_damage(seed: int) -> None:
    start = PNG.index(b"IDAT") + 4
    place = int(np.random.default_rng(seed).integers(start, len(PNG) - 20))
    data = bytearray(PNG)
    data[place] ^= 1 << seed % 8
    with pytest.raises(ImageFileError, match=r"^damaged image"):
        decode_image(bytes(data))


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE"])
def test_a_critical_chunk_with_a_bad_checksum_is_damage(name: bytes) -> None:
    palette = png_chunks(file_bytes(Image.fromarray(PICTURE).quantize(30)))
    data = png_of(*(png_chunk(kind, body, 1 if kind == name else None) for kind, body in palette))
    with pytest.raises(ImageFileError, match=f"the checksum of its {name.decode()} chunk is wrong"):
        decode_image(data)


def test_a_missing_palette_is_damage() -> None:
    """Pillow makes the image black."""
    chunks = [chunk for chunk in png_chunks(file_bytes(Image.fromarray(PICTURE).quantize(30))) if chunk[0] != b"PLTE"]
    with pytest.raises(ImageFileError, match="its palette chunk, PLTE, is missing"):
        decode_image(png_of(*(png_chunk(*chunk) for chunk in chunks)))


def test_a_damaged_checksum_of_whole_pixels_is_not() -> None:
    """Zlib's own checksum vouches for them; Pillow never looked at PNG's."""
    data = png_of(*(png_chunk(kind, body, 1 if kind == b"IDAT" else None) for kind, body in png_chunks(PNG)))
    assert np.array_equal(decode_image(data), PICTURE)


def test_a_png_without_its_end_is_whole() -> None:
    assert np.array_equal(decode_image(PNG[:-12]), PICTURE)
    assert np.array_equal(decode_image(PNG + b"trailing bytes"), PICTURE)
    for chunks, reason in ((png_chunks(PNG)[1:], "IHDR, is missing"), (png_chunks(PNG)[:1], "it holds no pixels")):
        with pytest.raises(ImageFileError, match=f"damaged image .*{reason}"):
            decode_image(png_of(*(png_chunk(*chunk) for chunk in chunks)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_rubbish_in_a_file_never_ends_in_another_error(format: str) -> None:
    data = file_bytes(PICTURE, format)
    rng = np.random.default_rng(len(data))
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.integers(0, min(len(data), 400), 3):
            changed[place] = rng.integers(256)
        for exif in ("ignore", "apply"):
            try:
                decode_image(bytes(changed), exif=exif)
            except ImageFileError as error:
                assert str(error).isprintable()
