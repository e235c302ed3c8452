"""Decodes a stored JPEG with Pillow, whole, or says why it cannot be: never other pixels, never another size."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

__all__ = ["DamagedJpegError", "decode_jpeg"]


class DamagedJpegError(ValueError):
    """Not a whole JPEG file of the size that it should have; the message is part of a sentence."""


def decode_jpeg(encoded: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels of a JPEG file (uint8 (n,)): RGB, uint8 (height, width, 3).

    Raises `DamagedJpegError`.
    """
    try:
        with Image.open(BytesIO(encoded.tobytes()), formats=["JPEG"]) as image:
            if image.size != (width, height):
                raise ValueError(f"{image.height} x {image.width} pixels, but the shard says {height} x {width}")
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise DamagedJpegError("not a JPEG file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamagedJpegError(str(error)) from None
