from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from pipelines.strict_jpeg import DamagedJpegError, decode_jpeg


def jpeg(mode: str, height: int = 40, width: int = 57, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(3, height, width)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_equals_pillow(mode, progressive):
    data = jpeg(mode, quality=90, progressive=progressive)
    decoded = decode_jpeg(array(data), 40, 57)
    assert decoded.dtype == np.uint8 and decoded.flags.writeable
    assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_another_size_is_refused():
    with pytest.raises(DamagedJpegError, match=r"^40 x 57 pixels, but the shard says 57 x 40$"):
        decode_jpeg(array(jpeg("RGB")), 57, 40)


def test_every_truncation_is_refused():
    data = jpeg("RGB")
    for end in range(0, len(data) - 2, 7):
        with pytest.raises(DamagedJpegError):
            decode_jpeg(array(data[:end]), 40, 57)


def test_what_is_no_jpeg_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(make_image(3, 40, 57)).save(buffer, "PNG")
    for data in (b"", buffer.getvalue(), bytes(1000), b"\xff\xd8\xff" * 100):
        with pytest.raises(DamagedJpegError, match=r"^not a JPEG file$"):
            decode_jpeg(array(data), 40, 57)
