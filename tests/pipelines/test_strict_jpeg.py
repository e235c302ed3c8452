from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import make_image
from jpeg_files import joined, segments
from PIL import Image

from sdpnet.pipelines.images.strict_jpeg import DamagedJpegError, decode_jpeg
from sdpnet.pipelines.native import decoder as native_decoder


def jpeg(mode: str, height: int = 40, width: int = 57, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(3, height, width)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def pillows(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(params=["native", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native library, and as it is without."""
    if request.param == "native":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr(native_decoder, "available", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_equals_pillow(decoder, mode, progressive):
    data = jpeg(mode, quality=90, progressive=progressive)
    decoded = decode_jpeg(array(data), 40, 57)
    assert decoded.dtype == np.uint8 and decoded.flags.writeable
    assert np.array_equal(decoded, pillows(data))


def test_another_size_is_refused(decoder):
    with pytest.raises(DamagedJpegError, match=r"^40 x 57 pixels, but the shard says 57 x 40$"):
        decode_jpeg(array(jpeg("RGB")), 57, 40)


def test_every_truncation_is_refused(decoder):
    data = jpeg("RGB")
    for end in range(0, len(data) - 2, 7):
        with pytest.raises(DamagedJpegError):
            decode_jpeg(array(data[:end]), 40, 57)


def test_what_is_no_jpeg_is_refused(decoder):
    buffer = io.BytesIO()
    Image.fromarray(make_image(3, 40, 57)).save(buffer, "PNG")
    for data in (b"", buffer.getvalue(), bytes(1000)):
        with pytest.raises(DamagedJpegError, match=r"^not a JPEG file$"):
            decode_jpeg(array(data), 40, 57)
    with pytest.raises(DamagedJpegError):
        decode_jpeg(array(b"\xff\xd8\xff" * 100), 40, 57)


def test_what_no_pipeline_reads_is_refused(decoder):
    with pytest.raises(DamagedJpegError, match=r"^CMYK$"):
        decode_jpeg(array(jpeg("CMYK")), 40, 57)
    with pytest.raises(DamagedJpegError, match="179,836,800 pixels, the limit is 178,956,970"):
        decode_jpeg(array(jpeg("L")), 13_100, 13_728)  # before any memory is taken


def test_what_pillow_passes_over_is_refused(native):
    """Codes that end too early, too late, or that are none, which libjpeg only warns of."""
    found, rest = segments(jpeg("RGB", restart_marker_rows=1))
    marker = next(i for i in range(len(rest)) if rest[i : i + 1] == b"\xff" and rest[i + 1] == 0xD1)
    for data, reason in {
        joined(found, rest[: marker - 20] + rest[marker:]): "Corrupt JPEG data: premature end of data segment",
        joined(found, rest[: marker - 60] + 50 * b"\xfe" + rest[marker:]): "Corrupt JPEG data",
    }.items():
        pillows(data)
        with pytest.raises(DamagedJpegError, match=reason):
            decode_jpeg(array(data), 40, 57)


def test_a_grey_image_of_sampling_factors_that_there_are_not(native, monkeypatch):
    """libjpeg refuses them, whatever the image's size is to become: so must our own decoder."""
    found, rest = segments(jpeg("L"))
    frame = dict(found)[0xC0]
    assert frame[7] == 0x11
    bogus = [(marker, frame[:7] + b"\x51" + frame[8:] if marker == 0xC0 else body) for marker, body in found]
    with pytest.raises(DamagedJpegError, match="Bogus sampling factors"):
        decode_jpeg(array(joined(bogus, rest)), 40, 57)
