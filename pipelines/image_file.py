"""Decodes any image file to 8-bit RGB: the one decoder of conversion, prediction and whatever else reads image files.

    a file's bytes -> Pillow, one of `FORMATS` -> 8 bits a sample -> RGB -> upright, where that is asked for

The colours are those of torchvision's `default_loader`, Pillow's `convert("RGB")`: an alpha channel is dropped, not
composited, and CMYK is converted without its profile. One difference: greyscale of 16 bits is scaled to 8, where
`convert` clips. Of several frames or pages the first counts.
"""

from __future__ import annotations

import io
from typing import Final

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.errors import ImageFileError

__all__ = ["FORMATS", "decode_image", "format_of", "is_upright"]

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


def decode_image(data: bytes, *, exif: str = "ignore") -> np.ndarray:
    """The pixels of an image file.

    Args:
        data: the whole file. Its format is found by its content.
        exif: "ignore" gives the pixels as the file stores them, "apply" turns them upright as the file's EXIF
            orientation says. Unreadable EXIF data says nothing.

    Returns:
        RGB, uint8 (height, width, 3).

    Raises:
        ImageFileError: for a file that is empty, no image, of a format that is not read, truncated or otherwise
            damaged, a decompression bomb (over 178,956,970 pixels), or of samples without a known range.
    """
    if exif not in ("ignore", "apply"):
        raise ValueError(f"exif {exif!r}: must be ignore or apply")
    if not data:
        raise ImageFileError("empty (0 bytes); copy it again or remove it")
    try:
        image = _open(data)
        image.load()
        turn = _turn_of(image) if exif == "apply" else None
        image = _to_rgb(image)
        return np.asarray(image if turn is None else image.transpose(turn))
    except ImageFileError:
        raise
    except Exception as error:  # Pillow's readers raise almost any type on damaged files
        raise ImageFileError(_reason(error)) from error


def format_of(data: bytes) -> str:
    """Pillow's name of the format, such as "PNG". Raises `ImageFileError`."""
    try:
        return str(_open(data).format)
    except Exception as error:
        raise ImageFileError(_reason(error)) from error


def is_upright(data: bytes) -> bool:
    """Whether the file's EXIF orientation leaves its pixels as they are. Raises `ImageFileError`."""
    try:
        return _turn_of(_open(data)) is None
    except Exception as error:
        raise ImageFileError(_reason(error)) from error


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ImageFileError("floating-point pixels of unknown range; convert it to 8 or 16 bits")
    image.info.clear()  # else Pillow keeps the comment, and warns about a palette's transparency
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    # Pillow gives 16-bit PGM and some TIFF files as mode I (int32), 16-bit PNG as I;16.
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65_535:
        raise ImageFileError("greyscale values beyond 16 bits; convert it to 8 or 16 bits")
    return Image.fromarray(((grey * 255 + 32_767) // 65_535).astype(np.uint8))


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright according to its EXIF orientation. Unreadable EXIF data says nothing."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raises almost any type
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image (none of {', '.join(FORMATS)}); replace or remove it"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"too large to decode safely ({error}); reduce or remove it"
    message = " ".join(str(error).split()) or type(error).__name__
    return f"damaged image ({message}); copy it again, replace or remove it"
