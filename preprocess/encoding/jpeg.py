"""The native JPEG codec (`native/jpeg_codec.cpp`). Every call runs without the GIL.

The codec is built when the package is installed and may be missing. Call `available()` before any other function.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sdpnet.pipelines.native.library import NativeLibrary, library_path
from sdpnet.pipelines.native.status import Status
from sdpnet.pipelines.terminal.remedy import rebuild

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DamagedError",
    "Encoded",
    "TooLargeError",
    "UnsupportedError",
    "available",
    "encode",
    "keep",
    "reencode",
    "version",
]

INTERFACE: Final = 4  # the result of codec_interface(); part of `version`, because it determines the encoded bytes
SAMPLING_FACTORS: Final = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


class DamagedError(ValueError):
    """The JPEG is damaged. The message is that of libjpeg."""


class UnsupportedError(ValueError):
    """The codec does not support this kind of JPEG; the message says which kind it is. No damage was found so far."""


class TooLargeError(ValueError):
    """A decompression bomb: more than 178,956,970 pixels, or more than 500 scans."""


class Encoded(NamedTuple):
    """The bytes of a baseline JPEG file and its size in pixels."""

    data: bytes
    height: int
    width: int


class _Result(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("height", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("message", ctypes.c_char * 200),
    )


_ERRORS: Final = {
    Status.DAMAGED: DamagedError,
    Status.UNSUPPORTED: UnsupportedError,
    Status.TOO_LARGE: TooLargeError,
}


def available() -> bool:
    """Whether the library was built by this version of the package and can be loaded."""
    return LIBRARY.available()


def version() -> str:
    """The version of the codec and that of the libjpeg-turbo with which it was built."""
    return f"native codec {INTERFACE}, libjpeg-turbo {_loaded().codec_turbo_version().decode()}"


def reencode(data: bytes, max_side: int, quality: int, subsampling: str, restart_rows: int) -> Encoded:
    """Re-encodes an 8-bit greyscale or YCbCr JPEG. The parameters are those of `EncodeSettings`.

    A JPEG that must be reduced is decoded, averaged as in `sdpnet.pipelines.images.area`, and compressed. The pixels
    are those of Pillow's decoder and the bytes those of Pillow's encoder, if both use the same libjpeg-turbo.

    A regular baseline JPEG that keeps its size is re-encoded without decoding it to pixels. Its chroma sampling must be
    the requested one, or 4:4:4 if 4:2:0 is requested, or it must be greyscale. Each DCT coefficient is divided by its
    quantizer of this `quality` (libjpeg's `jpeg_set_quality`) and rounded to the nearest integer. To halve chroma, the
    coefficients are replaced by those of the averages of 2 x 2 samples. The result differs from decoding and
    encoding only by the rounding and clamping of pixels, and is on average no further from the original.

    Raises:
        DamagedError: image data is lost or the file is truncated. Bytes after the image, extraneous bytes before
            a marker and unusual Adobe or JFIF markers are not damage.
        UnsupportedError: the JPEG has other colours (CMYK, RGB, ...), 12 bits, or arithmetic or lossless coding.
        TooLargeError: the JPEG is a decompression bomb.
    """
    return _call("codec_reencode", data, len(data), max_side, quality, *SAMPLING_FACTORS[subsampling], restart_rows)


def encode(pixels: np.ndarray, max_side: int, quality: int, subsampling: str, restart_rows: int) -> Encoded:
    """Reduces pixels as in `reencode` and compresses them.

    Args:
        pixels: uint8 RGB (height, width, 3).
        max_side, quality, subsampling, restart_rows: see `EncodeSettings`.
    """
    height, width, channels = pixels.shape
    import numpy as np  # imported here, because most worker processes never need it

    if pixels.dtype != np.uint8 or channels != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, must be uint8 (height, width, 3)")
    pixels = np.ascontiguousarray(pixels)
    sampling = SAMPLING_FACTORS[subsampling]
    return _call("codec_encode", pixels.ctypes.data, height, width, max_side, quality, *sampling, restart_rows)


def keep(data: bytes, max_side: int, restart_rows: int) -> Encoded:
    """Rewrites a JPEG with the same DCT coefficients as a baseline JFIF file without other metadata.

    A regular baseline JPEG keeps its Huffman tables, with additional codes that DC differences after a restart marker
    may need. All other JPEGs get the standard tables.

    Args:
        data: the bytes of the file.
        max_side: the largest length of a side in pixels; 0 for no limit.
        restart_rows: the number of MCU rows between restart markers; 0 writes none.

    Raises:
        UnsupportedError: as in `reencode`, and if the image is longer than `max_side` or cannot be stored as a baseline
            JPEG that TurboJPEG can read (with the sampling 4:4:4, 4:2:2, 4:2:0, 4:4:0 or 4:1:1, or greyscale).
        DamagedError, TooLargeError: as in `reencode`.
    """
    return _call("codec_keep", data, len(data), max_side, restart_rows)


def _call(name: str, *arguments: object) -> Encoded:
    result = _Result()
    status = getattr(_loaded(), name)(*arguments, ctypes.byref(result))
    if status == Status.OK:
        return Encoded(ctypes.string_at(result.data, result.size), result.height, result.width)
    message = result.message.decode("utf-8", "replace")
    if status == Status.NO_MEMORY:
        raise MemoryError(message)
    if status == Status.TOO_LONG:
        raise UnsupportedError(f"{max(result.height, result.width)} px but --max-side {arguments[2]}")
    raise _ERRORS[status](message)


def _loaded() -> ctypes.CDLL:
    try:
        return LIBRARY.load()
    except OSError:
        raise RuntimeError(f"the native JPEG codec is not built: {rebuild()}") from None


def _declare(library: Any) -> None:
    size, unsigned, integer, result = ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int, ctypes.POINTER(_Result)
    library.codec_turbo_version.restype = ctypes.c_char_p
    library.codec_reencode.argtypes = (ctypes.c_char_p, size, *[integer] * 5, result)
    library.codec_encode.argtypes = (ctypes.c_void_p, unsigned, unsigned, *[integer] * 5, result)
    library.codec_keep.argtypes = (ctypes.c_char_p, size, integer, integer, result)


_FOLDER = os.path.join(os.path.dirname(__file__), os.pardir, "native")
LIBRARY = NativeLibrary(library_path(_FOLDER, "jpeg_codec"), ("codec_interface", INTERFACE), _declare)
