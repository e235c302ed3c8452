"""Decodes and saves images with Pillow: whatever the native codec does not handle, and all where it is not built."""

from __future__ import annotations

import io
import os
from typing import Final

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL import __version__ as pillow_version

from pipelines.errors import UserError
from preprocess.area import average

__all__ = ["decode", "open_image", "pixels_of", "reason", "reduce", "save", "turn_of", "version"]

# What Pillow may try, whatever the suffix says. Other formats start programs (EPS: Ghostscript).
FORMATS: Final = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF")
TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def version() -> str:
    """Pillow's, and that of its libjpeg-turbo."""
    return f"Pillow {pillow_version} with libjpeg-turbo {features.version('libjpeg_turbo') or 'none'}"


def reason(error: Exception) -> str:
    """What is wrong with an image, whatever was raised on reading it, and what to do."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image (none of {', '.join(FORMATS)}); replace or remove it"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"too large to decode safely ({error}); reduce or remove it"
    message = " ".join(str(error).split()) or type(error).__name__
    return f"damaged image ({message}); copy it again, replace or remove it"


def open_image(data: bytes) -> Image.Image:
    """The image in a file of one of `FORMATS`, not yet decoded."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decode(data: bytes, exif: str, name: str) -> Image.Image:
    """The image as mode RGB, fully loaded."""
    image = open_image(data)
    image.load()
    turn = turn_of(image) if exif == "apply" else None
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image, name)
    elif image.mode == "F":
        raise UserError(f"{name}: floating-point pixels of unknown range; convert it to 8 or 16 bits")
    image.info.clear()  # else Pillow keeps the comment, and warns about a palette's transparency
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright according to its EXIF orientation. Unreadable EXIF data says nothing."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raises almost any type
        return None


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 (height, width, 3) of an image of mode RGB."""
    return np.asarray(image)


def reduce(image: Image.Image, height: int, width: int) -> Image.Image:
    """An image of mode RGB, averaged to this size."""
    if (width, height) == image.size:
        return image
    return Image.fromarray(average(np.asarray(image), height, width))


def _from_16_bits(image: Image.Image, name: str) -> Image.Image:
    # Pillow gives 16-bit PGM and some TIFF files as mode I (int32), 16-bit PNG as I;16.
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65_535:
        raise UserError(f"{name}: greyscale values beyond 16 bits; convert it to 8 or 16 bits")
    return Image.fromarray(((grey * 255 + 32_767) // 65_535).astype(np.uint8))


def save(image: Image.Image, quality: int, subsampling: str, restart_rows: int) -> bytes:
    """The image as a baseline JPEG with libjpeg's standard Huffman tables."""
    # Pillow releases the GIL while it encodes into a file descriptor, and holds it for BytesIO: about 1 ms an
    # image, which would limit many workers.
    memory = os.memfd_create("encode") if hasattr(os, "memfd_create") else None
    with io.BytesIO() if memory is None else open(memory, "w+b", buffering=0) as file:
        image.save(
            file,
            "JPEG",
            quality=quality,
            subsampling=subsampling,
            restart_marker_rows=restart_rows,
            optimize=False,
            progressive=False,
        )
        file.seek(0)
        return file.read()
