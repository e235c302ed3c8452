from __future__ import annotations

import io
import itertools
import struct
import tarfile
from contextlib import closing

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.datasets.folder import default_loader

from pipelines.errors import UserError
from preprocess.encode import EncodeSettings, encode_image, encode_split
from preprocess.scan import scan


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


def segments(jpeg: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The marker segments before the scan, as (marker, body), and the entropy-coded rest."""
    assert jpeg[:2] == b"\xff\xd8"
    position, found = 2, []
    while True:
        prefix, marker, length = struct.unpack(">BBH", jpeg[position : position + 4])
        assert prefix == 0xFF
        found.append((marker, jpeg[position + 4 : position + 2 + length]))
        position += 2 + length
        if marker == 0xDA:
            return found, jpeg[position:]


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
    with pytest.raises(UserError, match="beyond 16 bits"):
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
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
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
    "settings", [{"max_side": -1}, {"quality": 0}, {"quality": 101}, {"subsampling": "4:1:1"}, {"restart_rows": -1}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        EncodeSettings(**settings)


def test_split_is_encoded_in_order_and_can_be_stopped(image_folder):
    split = scan(image_folder).splits["train"]
    expected = [encode_image(split.locate(index).path, EncodeSettings()) for index in range(split.num_images)]
    with closing(encode_split(split, EncodeSettings(), num_workers=3)) as images:
        assert list(images) == expected
    with closing(encode_split(split, EncodeSettings(), num_workers=3)) as images:
        assert next(images) == expected[0]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_an_archive_is_encoded_as_its_folder(image_folder, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(image_folder / "train", arcname="train")
    splits = [scan(source).splits["train"] for source in (image_folder / "train", tmp_path / "train.tar")]
    folder, archive = (list(encode_split(split, EncodeSettings(), num_workers=2)) for split in splits)
    assert folder == archive


def test_a_file_that_has_gone_is_named(image_folder, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "a" / name).write_bytes((image_folder / "train" / "ant" / "0.jpg").read_bytes())
    split = scan(tmp_path).splits["train"]
    (tmp_path / "a" / "1.jpg").unlink()
    missing, image = encode_split(split, EncodeSettings(), num_workers=2)
    assert str(missing).startswith(f"{tmp_path}/a/1.jpg: cannot be read (No such file")
    assert not isinstance(image, UserError)
