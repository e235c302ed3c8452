"""`crop_shim.cpp`, built and loaded: the parts of the crop decoder, one by one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

__all__ = ["CropLibrary", "build_shim"]

HERE = Path(__file__).resolve().parent


def build_shim(name: str, directory: Path) -> Path:
    """Compiles tests/NAME.cpp against libjpeg; skips the test where that is impossible. Returns the library's path."""
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
        """The box's pixels, uint8 (height, width, 3); None where our decoder leaves the file to libjpeg."""
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
        """A box (top, left, height, width; by default all) of uint8 (h, w, 3) -> uint8 (*out, 3)."""
        height, width = pixels.shape[:2]
        output = np.full((*out, 3), 77, np.uint8)
        arguments = (pixels.ctypes.data, height, width, (ctypes.c_double * 4)(*(box or (0, 0, height, width))))
        self.library.crop_resize(*arguments, output.ctypes.data, *out, flip, avx2)
        return output
