"""Converts any image file to the JPEG that is stored.

    re-encoded: file -> decode -> RGB -> area averaging down to max_side -> baseline JPEG
                or, for a JPEG that keeps its size: DCT coefficients -> rounded to the quantizers of the new quality
    kept:       DCT coefficients of a JPEG -> the same coefficients as a baseline JPEG

By default there is a restart marker at each MCU row, so that a decoder can start at the first row of a crop. JPEGs are
processed by the native codec (`sdpnet.preprocess.encoding.jpeg`) if it is built. All other images, and all images
without the codec, are decoded by Pillow, which is imported when it is first needed.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from sdpnet.pipelines.errors import ImageFileError, UserError
from sdpnet.pipelines.images.kinds import MAX_PIXELS
from sdpnet.pipelines.terminal.remedy import rebuild
from sdpnet.preprocess.encoding import jpeg
from sdpnet.preprocess.encoding.settings import (
    EXIF_CHOICES,
    JPEG_MAX_SIDE,
    REENCODE_CHOICES,
    SUBSAMPLINGS,
    EncodeSettings,
)

__all__ = [
    "EXIF_CHOICES",
    "REENCODE_CHOICES",
    "SUBSAMPLINGS",
    "EncodeSettings",
    "EncodedImage",
    "codec",
    "encode_image",
]

JPEG_START: Final = b"\xff\xd8\xff"


class EncodedImage(NamedTuple):
    """A baseline JPEG file, its size in pixels, and whether it has the DCT coefficients of the original (`kept`)."""

    data: bytes
    height: int
    width: int
    kept: bool = False


def encode_image(
    source: bytes | str | os.PathLike[str], settings: EncodeSettings, name: str | None = None
) -> EncodedImage:
    """Encodes one image in the form in which it is stored.

    The colours are those of `sdpnet.pipelines.images.file.decode_image`, which `sdpnet predict` uses, too. Only the
    first frame of an animation is stored, and no metadata. Equal inputs give equal bytes with the same `codec()`.

    Args:
        source: the bytes of the file, or its path.
        settings: how to store the image.
        name: the name of the image in messages; the default is the path.

    Raises:
        UserError: the image cannot be read or decoded, is too long for a JPEG, or cannot be kept although
            `settings.reencode` is "never"; or `settings.reencode` is "auto" or "never" and the native codec is not
            built. The message has the name of the image.
    """
    if isinstance(source, bytes):
        data, name = source, name or "image"
    else:
        name = name or os.fspath(source)
        try:
            with open(source, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    if not data:
        raise UserError(f"{name}: empty (0 bytes); copy it again or remove it")
    if settings.reencode != "always" and not jpeg.available():
        raise UserError(f"--reencode {settings.reencode} needs the native JPEG codec, which is not built: {rebuild()}")
    try:
        return _encode(data, settings, name)
    except ImageFileError as error:
        raise UserError(f"{name}: {error}") from error
    except jpeg.TooLargeError as error:
        raise UserError(f"{name}: too large to decode safely ({error}); reduce or remove it") from None
    except jpeg.DamagedError as error:
        raise UserError(f"{name}: damaged image ({error}); copy it again, replace or remove it") from error


def codec() -> str:
    """The libraries that determine the encoded bytes, with their versions."""
    from sdpnet.preprocess.encoding import pillow

    return f"{jpeg.version()}, {pillow.version()}" if jpeg.available() else pillow.version()


def _encode(data: bytes, settings: EncodeSettings, name: str) -> EncodedImage:
    is_jpeg = data.startswith(JPEG_START)
    if is_jpeg and settings.max_pixels < MAX_PIXELS:  # the codec has the limit MAX_PIXELS itself
        _require_size(data, settings.max_pixels)
    upright = settings.exif == "ignore" or _is_upright(data)
    if settings.reencode != "always":
        try:
            if not is_jpeg:
                raise jpeg.UnsupportedError(f"a {_format(data)}")
            if not upright:
                raise jpeg.UnsupportedError("EXIF orientation to apply")
            return EncodedImage(*jpeg.keep(data, settings.max_side, settings.restart_rows), kept=True)
        except jpeg.UnsupportedError as error:
            if settings.reencode == "never":
                _require_decodable(data, settings)
                message = f"{name}: cannot be kept as it is ({error}); --reencode auto would convert it"
                raise UserError(message) from None
    options = (settings.max_side, settings.quality, settings.subsampling, settings.restart_rows)
    if is_jpeg and upright and jpeg.available():
        try:
            return EncodedImage(*jpeg.reencode(data, *options))
        except jpeg.UnsupportedError:
            pass  # Pillow supports more colour spaces
    return _encode_pixels(data, settings, name)


def _encode_pixels(data: bytes, settings: EncodeSettings, name: str) -> EncodedImage:
    from sdpnet.pipelines.images.area import average, fit
    from sdpnet.pipelines.images.file import decode_reduced

    pixels = decode_reduced(data, settings.max_side, exif=settings.exif, max_pixels=settings.max_pixels)
    width, height = fit(pixels.shape[1], pixels.shape[0], settings.max_side)
    if max(width, height) > JPEG_MAX_SIDE:
        raise UserError(f"{name}: {width} x {height} pixels, but a JPEG has at most {JPEG_MAX_SIDE}; set --max-side")
    options = (settings.quality, settings.subsampling, settings.restart_rows)
    if jpeg.available():
        return EncodedImage(*jpeg.encode(pixels, settings.max_side, *options))
    from sdpnet.preprocess.encoding import pillow

    if pixels.shape[:2] != (height, width):
        pixels = average(pixels, height, width)
    return EncodedImage(pillow.save(pixels, *options), height, width)


def _require_size(data: bytes, max_pixels: int) -> None:
    """Raises `ImageFileError` for a JPEG with more pixels."""
    from sdpnet.pipelines.images.jpeg_frame import frame_of
    from sdpnet.pipelines.images.reasons import too_large

    frame = frame_of(data)
    if frame is not None and frame.height * frame.width > max_pixels:
        pixels = frame.height * frame.width
        raise too_large(f"{pixels:,} pixels, more than the {max_pixels:,} of --max-pixels")


def _is_upright(data: bytes) -> bool:
    from sdpnet.pipelines.images.file import is_upright

    return is_upright(data)


def _require_decodable(data: bytes, settings: EncodeSettings) -> None:
    from sdpnet.pipelines.images.file import decode_reduced

    decode_reduced(data, settings.max_side, max_pixels=settings.max_pixels)


def _format(data: bytes) -> str:
    from sdpnet.pipelines.images.file import format_of

    return format_of(data)
