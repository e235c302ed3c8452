"""Decodes a stored JPEG, whole, or says why it cannot be: never other pixels, never another size.

The one decoder of stored images besides the fast pipelines: `verify --decode`, `adopt --decode`, the contact sheet and
the torchvision pipeline use it. It is the native crop decoder, asked for the whole image, so that what training with
the native pipeline refuses is refused here too. Pillow, which stands in where that is not built, passes over some
damage: libjpeg only warns of codes that do not belong to an image, and Pillow drops its warnings.
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
    """Not a whole JPEG file of the size that it should have, or of a kind that shards do not hold.

    The message is part of a sentence.
    """


def decode_jpeg(encoded: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels of a JPEG file (uint8 (n,)): RGB, uint8 (height, width, 3).

    Raises `DamagedJpegError`, and `MemoryError` where no memory is left.
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
