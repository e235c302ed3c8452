"""Access to the parts of the crop decoder: `crop_shim.cpp` and `region_shim.cpp`, compiled and loaded."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st
from jpeg_files import make_image

__all__ = [
    "SAMPLINGS",
    "CropLibrary",
    "Refusal",
    "Region",
    "RegionLibrary",
    "boxes",
    "build_shim",
    "edge_boxes",
    "files",
]

HERE = Path(__file__).resolve().parent
GREY, RGB, YCBCR = 1, 2, 3  # J_COLOR_SPACE
SAMPLINGS = {  # horizontal and vertical factors of the three components
    "4:4:4": (1, 1, 1, 1, 1, 1),
    "4:2:2": (2, 1, 1, 1, 1, 1),
    "4:2:0": (2, 2, 1, 1, 1, 1),
    "4:4:0": (1, 2, 1, 1, 1, 1),
    "4:1:1": (4, 1, 1, 1, 1, 1),
    "4:1:0": (4, 2, 1, 1, 1, 1),
    "1x4": (1, 4, 1, 1, 1, 1),
    "2x4": (2, 4, 1, 1, 1, 1),
    "3x1": (3, 1, 1, 1, 1, 1),
    "1x3": (1, 3, 1, 1, 1, 1),
    "3x2": (3, 2, 1, 1, 1, 1),
    "all 2x1": (2, 1, 2, 1, 2, 1),
    "2x2 2x1 1x2": (2, 2, 2, 1, 1, 2),
    "more chroma": (1, 1, 2, 2, 2, 2),
}
BOX = ctypes.c_uint32 * 4


def build_shim(name: str, directory: Path) -> Path:
    """Compiles NAME.cpp against libjpeg and returns the path of the library. Skips the test if that is impossible."""
    compiler = shutil.which("g++")
    headers = "#include <cstdio>\n#include <jpeglib.h>\n"
    check = [compiler or "false", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(check, input=headers, text=True, capture_output=True, check=False).returncode:
        pytest.skip("needs g++ and libjpeg's headers (Debian: g++ libjpeg-dev)")
    path = directory / f"{name}.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, HERE / f"{name}.cpp", "-o", path, "-ljpeg"], check=True)
    return path


class CropLibrary:
    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        unsigned, pointer = ctypes.c_uint32, ctypes.c_void_p
        self.library.crop_baseline.argtypes = (
            *(ctypes.c_char_p, ctypes.c_size_t, unsigned, unsigned),
            *(unsigned * 4, ctypes.c_bool, pointer),
        )
        self.library.crop_resize.argtypes = (
            *(pointer, unsigned, unsigned, ctypes.c_double * 4),
            *(pointer, unsigned, unsigned, ctypes.c_bool, ctypes.c_bool),
        )
        self.library.crop_resize.restype = None

    def baseline(
        self, data: bytes, size: tuple[int, int], box: tuple[int, int, int, int], avx2: bool = True
    ) -> np.ndarray | None:
        """The pixels of the box, uint8 (height, width, 3), or None if our decoder passes the file to libjpeg."""
        pixels = np.full((box[2], box[3], 3), 77, np.uint8)
        arguments = (data, len(data), *size, (ctypes.c_uint32 * 4)(*box), avx2, pixels.ctypes.data)
        return pixels if self.library.crop_baseline(*arguments) else None

    def resize(
        self,
        pixels: np.ndarray,
        out: tuple[int, int],
        box: tuple[float, float, float, float] | None = None,
        flip: bool = False,
        avx2: bool = True,
    ) -> np.ndarray:
        """Resizes a box (top, left, height, width; by default all) of uint8 (h, w, 3) to uint8 (*out, 3)."""
        height, width = pixels.shape[:2]
        output = np.full((*out, 3), 77, np.uint8)
        arguments = (pixels.ctypes.data, height, width, (ctypes.c_double * 4)(*(box or (0, 0, height, width))))
        self.library.crop_resize(*arguments, output.ctypes.data, *out, flip, avx2)
        return output


class _Region(ctypes.Structure):
    _fields_ = (
        ("height", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("box", ctypes.c_double * 4),
        ("message", ctypes.c_char * 200),
    )


class Region(NamedTuple):
    pixels: np.ndarray  # uint8 (height, width, 3)
    box: tuple[float, ...]  # top, left, height, width in them


class Refusal(NamedTuple):
    status: int
    message: str


class RegionLibrary:
    """The functions of `region_shim.cpp`."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.region_decode.argtypes = (
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint32),
            *(BOX, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.POINTER(_Region)),
        )
        self.library.region_write.argtypes = (
            *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int * 6, ctypes.c_int),
            *(ctypes.c_bool, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t),
        )
        self.library.region_write.restype = ctypes.c_size_t

    def decode(
        self, data: bytes, size: tuple[int, int], box: tuple[int, int, int, int], out: tuple[int, int] | None = None
    ) -> Region | Refusal:
        """Decodes the region for a box that is to be resized to `out`, by default its own size."""
        out = out or (box[2], box[3])
        pixels = np.full((box[2] * box[3] * 3,), 77, np.uint8)
        region = _Region()
        arguments = (data, len(data), *size, BOX(*box), *out, pixels.ctypes.data, ctypes.byref(region))
        status = self.library.region_decode(*arguments)
        if status:
            return Refusal(status, region.message.decode())
        assert region.message == b""
        shape = (region.height, region.width, 3)
        return Region(pixels[: np.prod(shape)].reshape(shape), tuple(region.box))

    def write(
        self, pixels: np.ndarray, sampling: str, colours: int = YCBCR, progressive: bool = False, restarts: int = 0
    ) -> bytes:
        factors = (ctypes.c_int * 6)(*SAMPLINGS[sampling])
        height, width = pixels.shape[:2]
        room = ctypes.create_string_buffer(10_000 + 20 * pixels.size)
        arguments = (pixels.ctypes.data, height, width, factors, colours, progressive, restarts, room, len(room))
        size = self.library.region_write(*arguments)
        assert 0 < size < len(room)
        return room.raw[:size]


def edge_boxes(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of each row and each column alone, and from it to either end of the image."""
    for top in range(height):
        yield from ((top, 0, 1, width), (top, 0, height - top, width), (0, 0, top + 1, width))
    for left in range(width):
        yield from ((0, left, height, 1), (0, left, height, width - left), (0, 0, height, left + 1))


@st.composite
def boxes(draw, height: int, width: int, smallest: int = 1) -> tuple[int, int, int, int]:
    top, left = draw(st.integers(0, height - smallest)), draw(st.integers(0, width - smallest))
    return top, left, draw(st.integers(smallest, height - top)), draw(st.integers(smallest, width - left))


@st.composite
def files(draw) -> tuple[np.ndarray, str, int, bool, int]:
    """Draws the arguments of `RegionLibrary.write`."""
    pixels = make_image(draw(st.integers(0, 99)), draw(st.integers(1, 130)), draw(st.integers(1, 130)))
    colours = draw(st.sampled_from([YCBCR, YCBCR, RGB, GREY]))
    restarts = draw(st.sampled_from([0, 0, 1, 2, 3, 7, 100]))
    return pixels, draw(st.sampled_from(sorted(SAMPLINGS))), colours, draw(st.booleans()), restarts
