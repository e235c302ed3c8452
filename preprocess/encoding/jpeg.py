"""The native JPEG codec (`native/jpeg_codec.cpp`): every call runs without the GIL.

It is built when the package is installed and may be missing: ask `available()` before calling anything else.
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

INTERFACE: Final = 4  # codec_interface(); part of what decides the encoded bytes (`version`)
SAMPLING_FACTORS: Final = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


class DamagedError(ValueError):
    """The JPEG has lost data; the message is libjpeg's."""


class UnsupportedError(ValueError):
    """Nothing is wrong with the JPEG as far as it was read, but it is not of the kinds handled; says which kind."""


class TooLargeError(ValueError):
    """A decompression bomb: more than 178,956,970 pixels, or more than 500 scans."""


class Encoded(NamedTuple):
    """A baseline JPEG file's bytes and its size in pixels."""

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
    """Whether the library was built, by this version of the package, and can be loaded."""
    return LIBRARY.available()


def version() -> str:
    """The codec's own version and that of the libjpeg-turbo it was built with."""
    return f"native codec {INTERFACE}, libjpeg-turbo {_loaded().codec_turbo_version().decode()}"


def reencode(data: bytes, max_side: int, quality: int, subsampling: str, restart_rows: int) -> Encoded:
    """Re-encodes an 8-bit greyscale or YCbCr JPEG. The parameters are those of `EncodeSettings`.

    Where it is reduced: decoded, averaged as `sdpnet.pipelines.images.area` does, and compressed. The pixels are those
    of Pillow's decoder, and the bytes those of Pillow's encoder, where the two libjpeg-turbos agree.

    Where a clean baseline JPEG keeps its size, and its chroma sampling is the wanted one or 4:4:4 to become 4:2:0 or
    greyscale: the same but for the rounding and clamping of pixels, which there are none of. Each DCT coefficient is
    divided by its quantizer of this `quality` (libjpeg's `jpeg_set_quality`) and rounded to the nearest integer; to
    halve chroma, the coefficients become those of the averages of 2 x 2 samples. On average no more is lost so.

    Raises:
        DamagedError: image data is lost or the file is truncated. Bytes after the image, extraneous bytes before
            a marker and odd Adobe or JFIF markers are no damage.
        UnsupportedError: other colours (CMYK, RGB, ...), 12 bits, arithmetic or lossless coding.
        TooLargeError: a decompression bomb.
    """
    return _call("codec_reencode", data, len(data), max_side, quality, *SAMPLING_FACTORS[subsampling], restart_rows)


def encode(pixels: np.ndarray, max_side: int, quality: int, subsampling: str, restart_rows: int) -> Encoded:
    """Reduces uint8 RGB (height, width, 3) as `reencode` does, and compresses it."""
    height, width, channels = pixels.shape
    import numpy as np  # which most worker processes never need

    if pixels.dtype != np.uint8 or channels != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, must be uint8 (height, width, 3)")
    pixels = np.ascontiguousarray(pixels)
    sampling = SAMPLING_FACTORS[subsampling]
    return _call("codec_encode", pixels.ctypes.data, height, width, max_side, quality, *sampling, restart_rows)


def keep(data: bytes, max_side: int, restart_rows: int) -> Encoded:
    """Rewrites a JPEG with the same DCT coefficients: baseline, JFIF, no other metadata.

    The Huffman tables of clean baseline JPEGs stay, with codes added for what DC differences at a restart may
    need; those of others become the standard ones.

    Args:
        data: the file's bytes.
        max_side: 0, or what neither side may exceed.
        restart_rows: MCU rows between restart markers; 0 writes none.

    Raises:
        UnsupportedError: also what `reencode` handles but no baseline JPEG that TurboJPEG reads can hold
            (other samplings than 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 and greyscale), or longer than `max_side`.
        DamagedError, TooLargeError: as `reencode`.
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
