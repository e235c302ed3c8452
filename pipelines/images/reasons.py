"""Explains why an image file cannot be decoded and what to do about it. The codec's own reason is in the message."""

from __future__ import annotations

import re
from typing import Final

from sdpnet.pipelines.errors import ImageFileError
from sdpnet.pipelines.images.jpeg_frame import Frame
from sdpnet.pipelines.images.kinds import Kind
from sdpnet.pipelines.images.tiff_directory import TiffImage

__all__ = ["damaged", "out_of_memory", "too_large", "undecodable", "unknown_range"]

# Parts of codecs' messages about variants of their format that they do not support.
_NOT_READ: Final = re.compile(
    r"unsupported|not (yet )?supported|unknown|unrecognized|cannot handle|not implemented|unable to determine|"
    "invalid palette size",
    re.IGNORECASE,
)
# Messages of Pillow that give no reason, and better words for them.
_IN_WORDS: Final = {
    "not identified by this driver": "its width or height is missing or 0",
    "cannot load this image": "it holds no pixels",
    "decoder error -2": "the decoder cannot read its pixels",
    "broken data stream when reading image file": "the decoder cannot read its pixels",
}


def damaged(reason: str) -> ImageFileError:
    return ImageFileError(f"damaged image ({reason}); copy it again, replace or remove it")


def too_large(reason: object) -> ImageFileError:
    return ImageFileError(f"too large to decode safely ({reason}); reduce or remove it")


def out_of_memory() -> ImageFileError:
    return ImageFileError("needs more memory than is available; reduce it, or use a machine with more memory")


def unknown_range(samples: str) -> ImageFileError:
    return ImageFileError(f"{samples} of unknown range; choose a range of values, and convert it to 8 or 16 bits")


def undecodable(error: Exception, kind: Kind, jpeg: Frame | None, tiff: TiffImage | None) -> ImageFileError:
    """Explains the failure of a decoder.

    Args:
        error: the error that the decoder raised.
        kind: the kind of the file.
        jpeg: the frame header of a JPEG, if it has one.
        tiff: the first directory of a TIFF file.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    message = _IN_WORDS.get(message, message)
    if kind.format == "JPEG" and jpeg is None:
        message = "its frame header is missing"
    if jpeg is not None and (jpeg.bits != 8 or jpeg.components not in (1, 3, 4)):
        remedy = "convert it to 8 bits" if jpeg.bits != 8 else "convert it to PNG or to a JPEG of 3 components"
        return ImageFileError(f"{jpeg.coding}, which is not read ({message}): {remedy}")
    if jpeg is not None and jpeg.is_hierarchical:
        return ImageFileError(f"{jpeg.coding}, which is not read ({message}): convert it to PNG or to a plain JPEG")
    if jpeg is not None and jpeg.coding != "a JPEG":
        message = f"{jpeg.coding}: {message}"
    if tiff is not None and tiff.is_cut:
        return damaged(f"truncated: its directory is cut off; {message}")
    if tiff is not None and (tiff.is_unusual or _NOT_READ.search(message)):
        return _not_read(kind, f"{tiff.description}: {message}")
    if _NOT_READ.search(message):
        return _not_read(kind, message)
    if "BMFF" in message:  # libavif is strict: other decoders read some of the files that it refuses
        return ImageFileError(
            f"damaged image, or one that violates AVIF's rules ({message}); copy it again, or convert it to PNG or JPEG"
        )
    return damaged(message)


def _not_read(kind: Kind, reason: str) -> ImageFileError:
    return ImageFileError(f"{kind.name} of a kind that is not read ({reason}): convert it to PNG or JPEG")
