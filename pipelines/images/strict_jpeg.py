"""Decodes a whole stored JPEG, or refuses it with a reason. It never returns wrong pixels or another size.

`verify --decode`, `adopt --decode`, the contact sheet and the torchvision pipeline use it. It is the native crop
decoder with the whole image as crop, so that it refuses the images that the native pipeline refuses in training. Where
that is not built, Pillow is used, which does not detect all damage: libjpeg only warns about invalid codes, and Pillow
drops its warnings.
"""

from __future__ import annotations

from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from sdpnet.pipelines.images.kinds import MAX_PIXELS
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.native.status import Status

__all__ = ["DamagedJpegError", "decode_jpeg"]

_START: Final = b"\xff\xd8\xff"


class DamagedJpegError(ValueError):
    """A stored image is not a complete JPEG file of the expected size, or is of a kind that shards do not contain.

    The message is part of a sentence.
    """


def decode_jpeg(encoded: np.ndarray, height: int, width: int) -> np.ndarray:
    """Decodes a JPEG file.

    Args:
        encoded: uint8 (n,), the file.
        height, width: the image's expected size in pixels.

    Returns:
        RGB, uint8 (height, width, 3).

    Raises:
        DamagedJpegError: the file is damaged, or is not of that size.
        MemoryError: no memory is left.
    """
    if encoded[: len(_START)].tobytes() != _START:
        raise DamagedJpegError("not a JPEG file")
    if height * width > MAX_PIXELS:
        raise DamagedJpegError(f"{height * width:,} pixels, the limit is {MAX_PIXELS:,}")
    if not native_decoder.available():
        return _with_pillow(encoded.tobytes(), height, width)
    status, message, pixels = native_decoder.decode_whole(encoded, height, width)
    if status == Status.NO_MEMORY:
        raise MemoryError("no memory left for decoding")
    if status != Status.OK:
        raise DamagedJpegError(message)
    return pixels


def _with_pillow(encoded: bytes, height: int, width: int) -> np.ndarray:
    try:
        with Image.open(BytesIO(encoded), formats=["JPEG"]) as image:
            if image.size != (width, height):
                raise ValueError(f"{image.height} x {image.width} pixels, but the shard says {height} x {width}")
            if image.mode not in ("RGB", "L"):
                raise ValueError(image.mode)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise DamagedJpegError("not a JPEG file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DamagedJpegError(str(error)) from None
