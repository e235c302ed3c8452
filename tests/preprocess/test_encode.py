from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from jpeg_files import pillow_jpeg, replace_segment, segments
from PIL import Image, ImageOps
from torchvision.datasets.folder import default_loader

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.encoding import jpeg as native_jpeg
from sdpnet.preprocess.encoding.encode import EncodedImage, EncodeSettings, codec, encode_image


@pytest.fixture(params=["native", "pillow"], autouse=True)
def codec_in_use(request, monkeypatch):
    """Every test of this module runs with the native codec, and as where it is not built."""
    if request.param == "native":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr(native_jpeg, "available", lambda: False)
    return request.param


def make_image(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random picture: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


LOSSLESS = EncodeSettings(max_side=0, quality=100, subsampling="4:4:4")  # nearly


def file_bytes(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("subsampling", "mcu", "sampling"), [("4:2:0", (16, 16), 0x22), ("4:2:2", (8, 16), 0x21), ("4:4:4", (8, 8), 0x11)]
)
def test_baseline_with_a_restart_marker_at_each_row(subsampling, mcu, sampling):
    encoded = encode_image(file_bytes(make_image(1, 70, 101)), EncodeSettings(subsampling=subsampling))
    found, scan_data = segments(encoded.data)
    markers = [marker for marker, _ in found]
    assert set(markers) <= {0xE0, 0xDB, 0xC0, 0xC4, 0xDD, 0xDA}, "only JFIF, DQT, SOF0 (baseline), DHT, DRI, SOS"
    frame = dict(found)[0xC0]
    assert struct.unpack(">BHHB", frame[:6]) == (8, 70, 101, 3)
    assert [frame[7 + 3 * component] for component in range(3)] == [sampling, 0x11, 0x11]
    # Annex K.3's tables have 12 symbols for DC and 162 for AC; optimised ones have fewer.
    symbols = b"".join(body for marker, body in found if marker == 0xC4)
    assert len(symbols) == 2 * (17 + 12) + 2 * (17 + 162)
    rows, columns = -(-70 // mcu[0]), -(-101 // mcu[1])
    assert struct.unpack(">H", dict(found)[0xDD]) == (columns,)
    restarts = [b & 7 for a, b in itertools.pairwise(scan_data) if a == 0xFF and 0xD0 <= b <= 0xD7]
    assert restarts == [row % 8 for row in range(rows - 1)]


def test_restart_markers_change_no_pixel():
    data = file_bytes(make_image(2, 90, 120))
    with_markers = encode_image(data, EncodeSettings())
    without = encode_image(data, EncodeSettings(restart_rows=0))
    assert 0xDD not in dict(segments(without.data)[0])
    assert np.array_equal(decode(with_markers.data), decode(without.data))


def test_quality_and_determinism():
    data = file_bytes(make_image(3, 90, 120))
    sizes = [len(encode_image(data, EncodeSettings(quality=quality)).data) for quality in (50, 90, 100)]
    assert sizes == sorted(sizes)
    assert encode_image(data, EncodeSettings()) == encode_image(data, EncodeSettings())


@pytest.mark.parametrize(("height", "width"), [(58, 43), (51, 50), (77, 200), (100, 100), (999, 3), (2, 401)])
def test_reduces_by_area_averaging(height, width):
    pixels = make_image(4, height, width)
    encoded = encode_image(file_bytes(pixels), EncodeSettings(max_side=50, quality=100, subsampling="4:4:4"))
    longest = max(height, width)
    new_height, new_width = (max(1, round(side * 50 / longest)) for side in (height, width))
    assert (encoded.height, encoded.width) == (new_height, new_width)
    assert max(new_height, new_width) == 50
    # Exact area averages: repeat each pixel as often as there are output pixels, then average whole groups.
    expected = pixels.astype(np.float64)
    expected = expected.repeat(new_height, axis=0).reshape(new_height, height, width, 3).mean(1)
    expected = expected.repeat(new_width, axis=1).reshape(new_height, new_width, width, 3).mean(2)
    difference = np.abs(decode(encoded.data) - expected)
    assert difference.mean() < 1
    assert difference.max() < 5


def test_never_enlarges():
    pixels = make_image(5, 40, 50)
    for max_side in (0, 50, 500):
        encoded = encode_image(file_bytes(pixels), EncodeSettings(max_side=max_side))
        assert (encoded.height, encoded.width) == (40, 50) == decode(encoded.data).shape[:2]


def as_mode(mode: str) -> tuple[Image.Image, str, dict[str, object]]:
    image = Image.fromarray(make_image(6, 64, 96))
    if mode == "P+alpha":
        return image.quantize(200), "PNG", {"transparency": bytes(range(200))}
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return image, "PNG", {}
    if mode == "CMYK":
        return image.convert("CMYK"), "JPEG", {"quality": 95}
    return image.convert(mode), "PNG", {}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # from the oracle
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "P+alpha", "RGBA", "LA", "CMYK"])
def test_colours_are_those_of_torchvision(tmp_path, mode):
    image, format, options = as_mode(mode)
    path = tmp_path / "image"
    path.write_bytes(file_bytes(image, format, **options))
    expected = np.asarray(default_loader(str(path)), np.int64)
    difference = np.abs(decode(encode_image(path, LOSSLESS).data) - expected)
    assert difference.mean() < 1
    assert difference.max() <= 6


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_greyscale_is_scaled(format):
    ramp = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = decode(encode_image(file_bytes(ramp, format), LOSSLESS).data)
    assert np.abs(decoded - (ramp / 257)[..., None]).max() <= 1.5


def test_greyscale_without_a_known_range_is_refused():
    with pytest.raises(UserError, match="32-bit pixels of unknown range"):
        encode_image(file_bytes(np.full((8, 8), 70_000, np.int32), "TIFF"), LOSSLESS)
    with pytest.raises(UserError, match="floating-point"):
        encode_image(file_bytes(np.zeros((8, 8), np.float32), "TIFF"), LOSSLESS)


def test_orientation_is_ignored_and_metadata_dropped():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    data = file_bytes(
        make_image(7, 40, 60), "JPEG", quality=95, exif=exif, comment=b"secret", icc_profile=b"profile", dpi=(72, 72)
    )
    encoded = encode_image(data, EncodeSettings())
    assert (encoded.height, encoded.width) == (40, 60)
    assert {marker for marker, _ in segments(encoded.data)[0]}.isdisjoint({0xE1, 0xE2, 0xFE})
    assert b"secret" not in encoded.data


def jpeg(height: int = 40, width: int = 60) -> bytes:
    return file_bytes(make_image(8, height, width), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"This is no image.\n" * 20, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"a PostScript document \(EPS\), not an image: render it"),
        (jpeg()[:1000], "damaged image .*truncated"),
        (jpeg()[:-20], "damaged image .*truncated"),
        (jpeg()[:30], "damaged image|not an image"),
        (file_bytes(make_image(9, 40, 40))[:900], "damaged image"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path, data, reason):
    path = tmp_path / "n01440764_1.JPEG"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"n01440764_1.JPEG: {reason}") as caught:
        encode_image(path, EncodeSettings())
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused():
    header = b"P6\n20000 20000\n255\n"
    with pytest.raises(UserError, match=r"bomb\.ppm: too large to decode safely"):
        encode_image(header + bytes(100), EncodeSettings(), name="bomb.ppm")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jpg: cannot be read \(No such file"):
        encode_image(tmp_path / "gone.jpg", EncodeSettings())


def test_longer_than_a_jpeg_may_be():
    data = file_bytes(np.zeros((2, 65_501, 3), np.uint8))
    with pytest.raises(UserError, match="65501 x 2 pixels"):
        encode_image(data, EncodeSettings(max_side=0))
    encoded = encode_image(data, EncodeSettings())
    assert (encoded.height, encoded.width) == (1, 500)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_side": -1},
        {"quality": 0},
        {"quality": 101},
        {"subsampling": "4:1:1"},
        {"restart_rows": -1},
        {"reencode": "sometimes"},
        {"exif": "auto"},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        EncodeSettings(**settings)


# ---- kinds of originals


def ycck(pixels: np.ndarray) -> bytes:
    """A YCCK JPEG as Photoshop writes: Adobe's marker says transform 2, values are inverted."""
    cmyk = pillow_jpeg(pixels, "CMYK", quality=95)
    adobe = dict(segments(cmyk)[0])[0xEE]
    assert adobe[:5] == b"Adobe"
    return replace_segment(cmyk, 0xEE, 0xEE, adobe[:-1] + b"\x02")


@pytest.mark.parametrize(
    "data",
    [
        pillow_jpeg(make_image(10, 70, 90), "CMYK", quality=95),
        ycck(make_image(10, 70, 90)),
        pillow_jpeg(make_image(10, 70, 90), "RGB", keep_rgb=True),
        pillow_jpeg(make_image(10, 70, 90), "L"),
        pillow_jpeg(make_image(10, 70, 90), progressive=True),
        pillow_jpeg(make_image(10, 71, 91), subsampling="4:2:2", restart_marker_blocks=7),
        pillow_jpeg(make_image(10, 1, 1)),
        pillow_jpeg(make_image(10, 1, 90), icc_profile=b"x" * 70_000),
        pillow_jpeg(make_image(10, 70, 90)) + b"trailing bytes",
        file_bytes(make_image(10, 70, 90), "PNG"),
        file_bytes(Image.fromarray(make_image(10, 70, 90)).quantize(50), "PNG"),
        file_bytes(make_image(10, 70, 90), "WEBP", lossless=True),
    ],
    ids=["cmyk", "ycck", "rgb", "grey", "progressive", "restarts", "1x1", "icc", "trailing", "png", "palette", "webp"],
)
@pytest.mark.parametrize("reencode", ["always", "auto"])
def test_kinds_are_stored_as_torchvision_sees_them(tmp_path, data, reencode, codec_in_use):
    if reencode == "auto" and codec_in_use == "pillow":
        pytest.skip("auto needs the native codec")
    path = tmp_path / "n01440764_1.JPEG"
    path.write_bytes(data)
    encoded = encode_image(path, EncodeSettings(0, 100, "4:4:4", reencode=reencode))
    expected = np.asarray(default_loader(str(path)), np.int64)
    assert (encoded.height, encoded.width) == expected.shape[:2]
    difference = np.abs(np.asarray(Image.open(io.BytesIO(encoded.data)).convert("RGB")) - expected)
    assert difference.max() <= (0 if encoded.kept else 6)
    assert difference.mean() < 1
    markers = {marker for marker, _ in segments(encoded.data)[0]}
    assert markers <= {0xE0, 0xDB, 0xC0, 0xC4, 0xDD, 0xDA}, "no metadata, and baseline"


@pytest.mark.parametrize("cut", [0, 1, 3, 20, 100, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "whole",
    [
        pillow_jpeg(make_image(11, 70, 90)),
        pillow_jpeg(make_image(11, 70, 90), progressive=True),
        pillow_jpeg(make_image(11, 70, 90), "CMYK"),
        file_bytes(make_image(11, 70, 90)),
    ],
    ids=["baseline", "progressive", "cmyk", "png"],
)
def test_truncated_files_are_refused(whole, cut):
    data = whole[: int(cut * len(whole)) if isinstance(cut, float) else cut]
    with pytest.raises(UserError, match=r"image: (empty|not an image|damaged image)") as caught:
        encode_image(data, EncodeSettings())
    assert "\n" not in str(caught.value)


def png_header(width: int, height: int) -> bytes:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_claiming(width: int, height: int) -> bytes:
    data = jpeg()
    frame = dict(segments(data)[0])[0xC0]
    return replace_segment(data, 0xC0, 0xC0, frame[:1] + struct.pack(">HH", height, width) + frame[5:])


@pytest.mark.parametrize("data", [png_header(65_500, 65_500), jpeg_claiming(65_500, 65_500)], ids=["png", "jpeg"])
def test_bombs_are_refused(data):
    with pytest.raises(UserError, match="image: too large to decode safely"):
        encode_image(data, EncodeSettings())


def with_components(number: int) -> bytes:
    data = jpeg()
    frame = dict(segments(data)[0])[0xC0]
    return replace_segment(data, 0xC0, 0xC0, frame[:5] + bytes([number]) + frame[6 : 6 + 3 * number])


@pytest.mark.parametrize(
    "data", [with_components(2), replace_segment(jpeg(), 0xC0, 0xC3), jpeg_claiming(0, 60), jpeg_claiming(60, 65_501)]
)
def test_impossible_jpegs_are_refused(data):
    with pytest.raises(UserError, match=r"image: (damaged image|not an image|a JPEG of 2 components)") as caught:
        encode_image(data, EncodeSettings())
    assert "\n" not in str(caught.value)


def test_native_and_pillow_give_the_same_bytes(monkeypatch, native):
    files = [
        file_bytes(make_image(12, 80, 120)),
        pillow_jpeg(make_image(12, 300, 200), quality=95),
        pillow_jpeg(make_image(12, 50, 200), "L", progressive=True),
        ycck(make_image(12, 80, 120)),
    ]
    settings = [EncodeSettings(100), EncodeSettings(0, 50, "4:2:2", 0), EncodeSettings(64, 100, "4:4:4", 2)]
    with monkeypatch.context() as patch:
        patch.setattr(native_jpeg, "available", lambda: False)
        expected = [encode_image(data, setting) for data in files for setting in settings]
        assert "native" not in codec()
    monkeypatch.setattr(native_jpeg, "available", lambda: True)
    assert [encode_image(data, setting) for data in files for setting in settings] == expected
    assert codec().startswith(f"native codec {native_jpeg.INTERFACE}, libjpeg-turbo ")


# ---- reencode


def test_auto_keeps_what_it_can(native, codec_in_use):
    settings = EncodeSettings(60, reencode="auto")
    if codec_in_use == "pillow":
        for reencode in ("auto", "never"):
            with pytest.raises(UserError, match=rf"--reencode {reencode} needs the native JPEG codec.* libjpeg-dev"):
                encode_image(jpeg(), EncodeSettings(reencode=reencode))
        return
    kept = encode_image(jpeg(), settings)
    assert kept.kept
    assert np.array_equal(decode(kept.data), decode(jpeg()))
    assert encode_image(jpeg(), EncodeSettings(60, reencode="never")) == kept
    assert not encode_image(jpeg(), EncodeSettings(60)).kept
    for other in (jpeg(61), file_bytes(make_image(8, 40, 60)), pillow_jpeg(make_image(8, 40, 60), "CMYK")):
        always = encode_image(other, EncodeSettings(60))
        assert encode_image(other, settings) == always == EncodedImage(always.data, always.height, always.width)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (file_bytes(make_image(8, 40, 60)), "a PNG"),
        (jpeg(40, 501), "501 px but --max-side 500"),
        (pillow_jpeg(make_image(8, 40, 60), "CMYK"), "CMYK"),
    ],
)
def test_never_names_what_it_cannot_keep(native, codec_in_use, data, reason):
    if codec_in_use == "pillow":
        return
    message = rf"^x\.jpg: cannot be kept as it is \({reason}\); --reencode auto would convert it$"
    with pytest.raises(UserError, match=message):
        encode_image(data, EncodeSettings(reencode="never"), "x.jpg")
    with pytest.raises(UserError, match=r"x\.jpg: not an image"):
        encode_image(b"no picture", EncodeSettings(reencode="never"), "x.jpg")
    twelve_bits = replace_segment(jpeg(), 0xC0, 0xC1, b"\x0c" + dict(segments(jpeg())[0])[0xC0][1:])
    for reencode in ("always", "auto", "never"):
        with pytest.raises(UserError, match=r"^x\.jpg: a 12-bit JPEG, which is not read .*: convert it to 8 bits$"):
            encode_image(twelve_bits, EncodeSettings(reencode=reencode), "x.jpg")


# ---- EXIF orientation


def oriented(orientation: int, format: str, mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(make_image(13, 40, 60)).convert(mode)
    return file_bytes(image, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))


@pytest.mark.parametrize(("format", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_when_asked_for(orientation, format, mode):
    data = oriented(orientation, format, mode)
    stored = Image.open(io.BytesIO(data))
    for exif, expected in (("apply", ImageOps.exif_transpose(stored)), ("ignore", stored)):
        encoded = encode_image(data, EncodeSettings(0, 100, "4:4:4", exif=exif))
        wanted = np.asarray(expected.convert("RGB"), np.int64)
        assert (encoded.height, encoded.width) == wanted.shape[:2]
        assert np.abs(decode(encoded.data) - wanted).max() <= 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # from Pillow, when it opens the file
@pytest.mark.parametrize("body", [b"", b"II*\0", b"garbage" * 9, b"MM\0*\0\0\0\x08\xff\xff\x01\x12"])
def test_damaged_exif_means_no_orientation(body):
    data = jpeg()
    segment = b"Exif\0\0" + body
    damaged = data[:2] + struct.pack(">HH", 0xFFE1, len(segment) + 2) + segment + data[2:]
    plain = encode_image(data, EncodeSettings())
    assert encode_image(damaged, EncodeSettings(exif="apply")) == plain
    assert encode_image(damaged, EncodeSettings()) == plain


def test_what_has_to_be_turned_is_never_kept(native, codec_in_use):
    if codec_in_use == "pillow":
        return
    turned = encode_image(oriented(6, "JPEG"), EncodeSettings(reencode="auto", exif="apply"))
    assert (turned.height, turned.width, turned.kept) == (60, 40, False)
    assert encode_image(oriented(1, "JPEG"), EncodeSettings(reencode="auto", exif="apply")).kept
    assert encode_image(oriented(6, "JPEG"), EncodeSettings(reencode="auto")).kept
    with pytest.raises(UserError, match=r"EXIF orientation to apply\); --reencode auto"):
        encode_image(oriented(6, "JPEG"), EncodeSettings(reencode="never", exif="apply"))
