"""Rows of an image, in bands, are those of the whole; large images take little more than Pillow's copy of them."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jpeg_files import make_image
from PIL import Image, ImageOps

from sdpnet.pipelines.errors import ImageFileError
from sdpnet.pipelines.images import file as image_file
from sdpnet.pipelines.images import picture
from sdpnet.pipelines.images.area import average, fit
from sdpnet.pipelines.images.file import decode_image, decode_reduced
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image

ROOT = Path(__file__).resolve().parents[2]
PIXELS = make_image(1, 61, 83)


def png(mode: str, orientation: int = 1) -> bytes:
    image = Image.fromarray(PIXELS)
    if mode == "I;16":
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.fixture(params=[64, 1 << 21])
def bands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of a row, and one band."""
    monkeypatch.setattr(picture, "_BAND_PIXELS", request.param)


@pytest.mark.usefixtures("bands")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_of_turned_images(orientation):
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(png("RGB", orientation))))
    assert (decode_image(png("RGB", orientation), exif="apply") == np.asarray(expected)).all()


@pytest.mark.usefixtures("bands")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_bands_of_all_modes_and_their_average(mode, monkeypatch):
    expected = PIXELS[..., :1].repeat(3, axis=2)
    if mode != "I;16":
        expected = np.asarray(Image.open(io.BytesIO(png(mode))).convert("RGB"))
    assert (decode_image(png(mode)) == expected).all()
    monkeypatch.setattr(image_file, "_LARGE_PIXELS", 100)
    for max_side in (1, 7, 50, 82):
        width, height = fit(83, 61, max_side)
        assert (decode_reduced(png(mode), max_side) == average(expected, height, width)).all()
    for max_side in (0, 83, 500):
        assert (decode_reduced(png(mode), max_side) == expected).all()


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_a_large_image_has_the_same_bytes(exif, monkeypatch):
    settings = EncodeSettings(max_side=40, exif=exif)
    before = encode_image(png("RGB", 6), settings)
    monkeypatch.setattr(image_file, "_LARGE_PIXELS", 100)
    assert encode_image(png("RGB", 6), settings) == before


MEASURE = """
import resource, sys
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.pipelines.images import file as image_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(encode_image(sys.argv[1], EncodeSettings())[1:3])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(("mode", "own"), [("P", 1), ("RGB", 4), ("I;16", 2)])
def test_memory_of_a_large_image(tmp_path, mode, own):
    """16 million pixels: `own` bytes a pixel are Pillow's image; 60 MB are for the rest."""
    Image.new(mode, (4000, 4000)).save(tmp_path / "large.png", compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "large.png"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    size, memory = done.stdout.splitlines()
    assert size == "(500, 500)" and int(memory) < own * 4000 * 4000 + 60_000_000


def test_more_pixels_than_wanted():
    """Refused before they are decoded, whatever the format."""
    for format in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "JPEG2000"):
        file = io.BytesIO()
        Image.fromarray(PIXELS).save(file, format)
        settings = EncodeSettings(max_pixels=61 * 83)
        assert encode_image(file.getvalue(), settings).width == 83
        for reencode in ("always",) if format != "JPEG" else ("always", "auto", "never"):
            settings = EncodeSettings(max_pixels=61 * 83 - 1, reencode=reencode)
            if reencode != "always" and not image_file.native_is_built():
                continue
            with pytest.raises(ValueError, match=r"a: too large .* \(5,063 pixels, more than the 5,062 of"):
                encode_image(file.getvalue(), settings, "a")


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 2)])
def test_sides_without_measure(size):
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    with pytest.raises(ImageFileError, match=r"too large .* a side has at most 1,048,576"):
        decode_image(file.getvalue())


def test_limits_stay_out_of_old_manifests():
    assert "max_pixels" not in EncodeSettings().to_dict() and "max_file_mb" not in EncodeSettings().to_dict()
    assert EncodeSettings(max_pixels=5).to_dict()["max_pixels"] == 5
