"""Pixels against Pillow on clean files, against NumPy where Pillow clips, and reasons where there are no pixels."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from image_files import file_bytes, png_chunk, png_chunks, png_of, tiff_with
from jpeg_files import make_image, pillow_jpeg, replace_segment, segments
from PIL import Image, ImageOps, features

from sdpnet.pipelines.errors import ImageFileError, UserError
from sdpnet.pipelines.images import file as image_file
from sdpnet.pipelines.images.file import FORMATS, decode_image, format_of, is_upright
from sdpnet.pipelines.native import decoder as native_decoder

PICTURE = make_image(1, 45, 60)


@pytest.fixture(params=["native", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """JPEGs are decoded by our own decoder, and as where it is not built."""
    if request.param == "native":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr(image_file, "native_is_built", lambda: False)
    return request.param


def by_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# ---- pixels


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"subsampling": "4:4:4", "keep_rgb": True}),
        ("BMP", {}),
        ("DIB", {}),
        ("GIF", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"big_tiff": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {}),
        ("JPEG2000", {}),
        ("JPEG2000", {"no_jp2": True}),
    ],
)
def test_every_format_has_pillows_pixels(format: str, options: dict[str, object], decoder: str) -> None:
    data = file_bytes(PICTURE, format, **options)
    pixels = decode_image(data)
    assert (pixels.dtype, pixels.shape) == (np.uint8, PICTURE.shape)
    assert pixels.flags.writeable and pixels.flags.owndata
    assert np.array_equal(pixels, by_pillow(data))
    assert format_of(data) == format


@pytest.mark.parametrize(
    ("mode", "format"),
    [(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGBA")]
    + [(mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr")]
    + [("CMYK", "JPEG"), ("L", "JPEG"), ("LA", "WEBP"), ("RGBA", "AVIF"), ("L", "JPEG2000"), ("RGBA", "JPEG2000")],
)
def test_every_colour_has_pillows_pixels(mode: str, format: str, decoder: str) -> None:
    data = file_bytes(Image.fromarray(PICTURE).convert(mode), format)
    try:
        expected = by_pillow(data)
    except OSError as error:
        pytest.skip(f"this Pillow cannot read the {mode} {format} that it has written: {error}")
    assert np.array_equal(decode_image(data), expected)


def test_the_first_frame_counts() -> None:
    frames = [Image.fromarray(make_image(seed, 20, 30)) for seed in range(3)]
    for format in ("GIF", "PNG", "TIFF", "WEBP", "AVIF", "MPO"):
        data = file_bytes(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.array_equal(decode_image(data), by_pillow(data)), format
        difference = decode_image(data).astype(int) - make_image(0, 20, 30)
        assert np.abs(difference).mean() < np.abs(make_image(1, 20, 30) - make_image(0, 20, 30).astype(int)).mean() / 2


def test_cielab_becomes_srgb() -> None:
    from PIL import ImageCms

    image = Image.fromarray(PICTURE)
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    difference = np.abs(decode_image(file_bytes(lab, "TIFF")).astype(int) - PICTURE)
    assert difference.mean() < 2 and np.percentile(difference, 95) <= 6


# ---- depth


def grey_tiff(values: np.ndarray, bits: int, order: str, photometric: int = 1, compression: str | None = None) -> bytes:
    """Greyscale of 12 bits, packed, or of 16 bits: values (height, width)."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2)
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
        content = packed.astype(np.uint8).tobytes()
    else:
        content = values.astype(f"{order}u2").tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(content))]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(content)) + content
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


@pytest.mark.parametrize(
    "data",
    [
        grey_tiff(np.rint(RAMP * 4095).astype(int), 12, "<"),
        grey_tiff(np.rint(RAMP * 65_535).astype(int), 16, "<"),
        grey_tiff(np.rint(RAMP * 65_535).astype(int), 16, ">"),
        grey_tiff(65_535 - np.rint(RAMP * 65_535).astype(int), 16, "<", photometric=0),
        file_bytes(np.rint(RAMP * 65_535).astype(np.uint16), "TIFF", compression="tiff_lzw"),
        file_bytes(np.rint(RAMP * 65_535).astype(np.uint16), "PNG"),
        file_bytes(np.rint(RAMP * 65_535).astype(np.uint16), "PPM"),
        file_bytes(np.rint(RAMP * 65_535).astype(np.uint16), "JPEG2000"),
        b"P2 64 48 4095\n" + " ".join(map(str, np.rint(RAMP * 4095).astype(int).ravel())).encode() + b"\n",
        b"P5 64 48 4095\n" + np.rint(RAMP * 4095).astype(">u2").tobytes(),
        b"P5 64 48 100\n" + np.rint(RAMP * 100).astype(np.uint8).tobytes(),
    ],
    ids=["12", "16", "16-be", "16-inverted", "16-lzw", "png", "pgm", "jp2", "plain-4095", "pgm-4095", "pgm-100"],
)
def test_greyscale_of_any_depth_uses_its_whole_range(data: bytes) -> None:
    difference = np.abs(decode_image(data) - RAMP[..., None] * 255)
    assert difference.max() <= (1.3 if not data.startswith(b"P5 64 48 100\n") else 2)
    assert decode_image(data).min() == 0 and decode_image(data).max() == 255


@pytest.mark.parametrize("order", ["<", ">"])
def test_planes_of_16_bits(order: str) -> None:
    """Pillow takes the first half of each uncompressed plane for the whole one."""
    planes = np.stack([RAMP, 1 - RAMP, RAMP**2]) * 65_535
    content = np.rint(planes).astype(f"{order}u2").tobytes()
    size = len(content) // 3
    lists = struct.pack(f"{order}3H6I", 16, 16, 16, *(8 + size * i for i in range(3)), *[size] * 3)
    end = 8 + len(content)
    tags = [(256, 4, 1, 64), (257, 4, 1, 48), (258, 3, 3, end), (259, 4, 1, 1), (262, 4, 1, 2), (273, 4, 3, end + 6)]
    tags += [(277, 4, 1, 3), (278, 4, 1, 48), (279, 4, 3, end + 18), (284, 4, 1, 2)]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", end + len(lists))
    entries = b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    data = head + content + lists + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    assert np.abs(decode_image(data) - planes.transpose(1, 2, 0) / 257).max() <= 1
    single = grey_tiff(np.rint(RAMP * 65_535).astype(int), 16, "<")
    assert np.array_equal(decode_image(tiff_with(single, (284, 3, 1, 2))), decode_image(single))


def test_deep_colour_in_jpeg_2000_is_refused() -> None:
    data = bytearray(file_bytes(PICTURE, "JPEG2000"))
    place = data.index(b"\xff\x4f\xff\x51") + 42
    data[place : place + 9 : 3] = b"\x0b\x0b\x0b"
    with pytest.raises(ImageFileError, match=r"^a JPEG 2000 image of 3 channels of 12 bits, which .* to 8 bits$"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.arange(64).reshape(8, 8).astype(np.int32), "signed 32-bit pixels"),
        (np.arange(64).reshape(8, 8).astype(np.float32), "floating-point pixels"),
    ],
)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_what_has_no_known_range_is_refused(values: np.ndarray, what: str, compression: str | None) -> None:
    options = {} if compression is None else {"compression": compression}
    with pytest.raises(ImageFileError, match=rf"^{what} of unknown range; choose a range .* 8 or 16 bits$"):
        decode_image(file_bytes(values, "TIFF", **options))


@pytest.mark.parametrize(
    ("tags", "what"),
    [
        ([(258, 3, 1, 8), (339, 3, 1, 2)], "signed 8-bit pixels"),
        ([(258, 3, 1, 16), (339, 3, 1, 2)], "signed 16-bit pixels"),
        ([(258, 3, 1, 32), (339, 3, 1, 1)], "32-bit pixels"),
        ([(258, 3, 1, 64), (339, 3, 1, 3)], "floating-point pixels"),
        ([(258, 3, 1, 16), (339, 3, 1, 3)], "floating-point pixels"),
    ],
)
def test_tiff_says_what_its_samples_are(tags: list[tuple[int, int, int, int]], what: str) -> None:
    data = tiff_with(grey_tiff(np.zeros((8, 8), int), 16, "<"), *tags)
    with pytest.raises(ImageFileError, match=f"^{what} of unknown range"):
        decode_image(data)


def test_a_raw_images_preview_is_not_the_image() -> None:
    data = file_bytes(PICTURE, "TIFF")
    for tags in ([(50706, 1, 4, 0x00000401)], [(254, 4, 1, 1), (330, 4, 1, 8)]):
        with pytest.raises(ImageFileError, match=r"^a camera's raw image \(DNG or the like\), which is not"):
            decode_image(tiff_with(data, *tags))


# ---- reasons


def test_the_codecs_own_reason_is_kept(decoder: str) -> None:
    data = pillow_jpeg(PICTURE)
    frame = dict(segments(data)[0])[0xC0]
    twelve = replace_segment(data, 0xC0, 0xC1, b"\x0c" + frame[1:])
    with pytest.raises(ImageFileError, match=r"^a 12-bit JPEG, which is not read \(.*12-bit.*: convert it to 8 bits$"):
        decode_image(twelve)
    with pytest.raises(ImageFileError, match=r"^a 12-bit lossless JPEG, which is not read"):
        decode_image(replace_segment(data, 0xC0, 0xC3, b"\x0c" + frame[1:]))
    with pytest.raises(ImageFileError, match=r"^damaged image \(a lossless JPEG: the decoder cannot read its pixels\)"):
        decode_image(replace_segment(data, 0xC0, 0xC3))  # its scan is not lossless
    with pytest.raises(ImageFileError, match=r"^damaged image \(an arithmetic-coded JPEG: "):
        decode_image(replace_segment(data, 0xC0, 0xC9)[:400])
    with pytest.raises(
        ImageFileError, match=r"^a hierarchical JPEG, which is not read \(.*\): convert it to PNG or to a plain"
    ):
        decode_image(replace_segment(data, 0xC0, 0xC5))
    two = replace_segment(data, 0xC0, 0xC0, frame[:5] + b"\2" + frame[6:12])
    with pytest.raises(ImageFileError, match=r"^a JPEG of 2 components, which is not read .* JPEG of 3 components$"):
        decode_image(two)
    with pytest.raises(ImageFileError, match=r"^damaged image \(its frame header is missing\)"):
        decode_image(data[:20])


def test_a_variant_that_is_not_read_is_not_called_damaged() -> None:
    bitmap = bytearray(file_bytes(PICTURE, "BMP"))
    bitmap[30:34] = struct.pack("<I", 4)  # biCompression: JPEG
    with pytest.raises(ImageFileError, match=r"^a BMP image of a kind that is not read \(.*\(4\)\): convert it to PNG"):
        decode_image(bytes(bitmap))
    tiff = file_bytes(PICTURE, "TIFF")
    for compression, name in ((50001, "WebP compression"), (12_345, "compression of number 12345")):
        reason = (
            rf"^a TIFF image of a kind that is not read \(3 channels of 8 bits, RGB, {name}: .*\): convert it to PNG"
        )
        with pytest.raises(ImageFileError, match=reason):
            decode_image(tiff_with(tiff, (259, 3, 1, compression)))
    with pytest.raises(ImageFileError, match=r"^a TIFF image of a kind .* of 7 bits, grey, no compression"):
        decode_image(tiff_with(grey_tiff(np.zeros((8, 8), int), 16, "<"), (258, 3, 1, 7)))
    apple = png_of(png_chunk(b"CgBI", b"\x50\0\x20\2"), *(png_chunk(*c) for c in png_chunks(file_bytes(PICTURE))))
    with pytest.raises(ImageFileError, match=r"^a PNG image in Apple's form for iOS, which is not read: convert it"):
        decode_image(apple)


@pytest.mark.parametrize("part", ["avif", "jpg_2000", "webp"])
def test_a_format_that_this_pillow_lacks_is_named(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_bytes(PICTURE, {"avif": "AVIF", "jpg_2000": "JPEG2000", "webp": "WEBP"}[part])
    monkeypatch.setattr(features, "check", lambda name: name != part)
    with pytest.raises(ImageFileError, match=r"(AVIF|JPEG 2000|WebP) image, which this build of Pillow cannot decode"):
        decode_image(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("part", [0.03, 0.3, 0.6, 0.95])
def test_truncated_files_are_damaged(format: str, part: float, decoder: str) -> None:
    data = file_bytes(PICTURE, format)
    with pytest.raises(ImageFileError, match=r"^damaged image") as caught:
        decode_image(data[: int(part * len(data))])
    assert str(caught.value).isprintable()


def test_errors_are_user_errors_without_a_name() -> None:
    for data in (b"", b"no picture", bytes(1000)):
        with pytest.raises(UserError) as caught:
            decode_image(data)
        assert isinstance(caught.value, ImageFileError)
    with pytest.raises(ValueError, match="exif 'turn': must be ignore or apply"):
        decode_image(file_bytes(PICTURE), exif="turn")


def test_bombs_are_refused() -> None:
    bombs = [b"P6\n20000 20000\n255\n" + bytes(99)]
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bombs.append(png_of(png_chunk(b"IHDR", header), png_chunk(b"IDAT", b""), png_chunk(b"IEND", b"")))
    jpeg = pillow_jpeg(PICTURE)
    frame = dict(segments(jpeg)[0])[0xC0]
    bombs.append(replace_segment(jpeg, 0xC0, 0xC0, frame[:1] + struct.pack(">HH", 60_000, 60_000) + frame[5:]))
    bombs.append(tiff_with(file_bytes(PICTURE, "TIFF"), (256, 4, 1, 60_000), (257, 4, 1, 60_000)))
    for bomb in bombs:
        with pytest.raises(ImageFileError, match=r"^too large to decode safely"):
            decode_image(bomb)


def test_pillow_is_asked_for_one_known_format_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    opened = Image.open

    def watching(file: object, mode: str = "r", formats: list[str] | None = None) -> Image.Image:
        assert formats is not None and len(formats) == 1
        asked.extend(formats)
        return opened(file, mode, formats)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", watching)
    monkeypatch.setattr(image_file, "native_is_built", lambda: False)
    for format in ("PNG", "JPEG", "TIFF", "EPS", "PDF", "TGA", "ICO"):
        data = file_bytes(PICTURE, format)
        for exif in ("ignore", "apply"):
            try:
                decode_image(data, exif=exif)
            except ImageFileError:
                assert format not in FORMATS
        is_upright(data)
    assert set(asked) == {"PNG", "JPEG", "TIFF"} and not {"EPS", "WMF", "PDF"} & set(FORMATS)


GHOSTSCRIPT = """
import io, sys
from pathlib import Path
from PIL import Image, EpsImagePlugin
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.file import decode_image, format_of, is_upright
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image

path, mark = Path(sys.argv[1]), Path(sys.argv[2])
data = path.read_bytes()
for exif in ("ignore", "apply"):
    for tried in (lambda: decode_image(data, exif=exif), lambda: encode_image(path, EncodeSettings(exif=exif))):
        try:
            tried()
        except UserError as error:
            assert "PostScript" in str(error), error
        else:
            raise AssertionError("decoded")
is_upright(data)
assert not mark.exists(), "Ghostscript was started"
try:
    Image.open(io.BytesIO(data)).load()  # Pillow itself would: else this test would see nothing
except Exception:
    pass
assert mark.exists()
"""


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for Ghostscript")
@pytest.mark.parametrize("start", [b"", b"\xc5\xd0\xd3\xc6"])
def test_ghostscript_is_never_started(tmp_path: Path, start: bytes) -> None:
    mark, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f'#!/bin/sh\n: >"{mark}"\nexit 1\n')
    (folder / "gs").chmod(0o755)
    eps = file_bytes(PICTURE, "EPS")
    if start:  # with DOS's binary header
        eps = start + struct.pack("<II", 32, len(eps)) + bytes(20) + eps
    (tmp_path / "picture.jpg").write_bytes(eps)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-W", "ignore", "-c", GHOSTSCRIPT, str(tmp_path / "picture.jpg"), str(mark)]
    root = Path(__file__).resolve().parents[2]
    subprocess.run(command, env=environment, cwd=root, check=True, timeout=120)


# ---- orientation


def oriented(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_bytes(PICTURE, format, exif=exif)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientation_is_applied_as_pillow_does(format: str, orientation: int, decoder: str) -> None:
    data = oriented(format, orientation)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(data, exif="apply"), upright)
    assert np.array_equal(decode_image(data), by_pillow(data))
    assert is_upright(data) == (orientation in (1, 9) or format == "TIFF")


def test_warnings_do_not_decide(recwarn: pytest.WarningsRecorder) -> None:
    """Neither a filter that makes them errors (this suite's) nor the decoder's own changes outlive a call."""
    data = file_bytes(Image.fromarray(PICTURE).quantize(20), "GIF", transparency=3)
    before = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(data)
        decode_image(oriented("JPEG", 6).replace(b"Exif\0\0", b"Exif\0\0xx"), exif="apply")
    assert warnings.filters == before and not recwarn.list


def test_our_own_decoder_has_pillows_pixels(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [("RGB", {}), ("L", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": "4:2:2"})]
    for seed, (mode, options) in enumerate(kinds):
        data = pillow_jpeg(make_image(seed, 33 + seed, 50), mode, **options)
        ours = decode_image(data)
        with monkeypatch.context() as patch:
            patch.setattr(image_file, "native_is_built", lambda: False)
            assert np.array_equal(decode_image(data), ours)
    assert native_decoder.available()
