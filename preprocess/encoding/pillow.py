"""Saves images with Pillow, for use without the native codec."""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image, features
from PIL import __version__ as pillow_version

__all__ = ["save", "version"]


def version() -> str:
    """The versions of Pillow and of its libjpeg-turbo, which determine the encoded bytes."""
    return f"Pillow {pillow_version} with libjpeg-turbo {features.version('libjpeg_turbo') or 'none'}"


def save(pixels: np.ndarray, quality: int, subsampling: str, restart_rows: int) -> bytes:
    """Encodes uint8 RGB (H, W, 3) as a baseline JPEG with libjpeg's standard Huffman tables."""
    # Pillow releases the GIL while it encodes to a file descriptor, but holds it while it encodes to a BytesIO. With a
    # descriptor, two threads convert 1.9 times as fast as one.
    memory = os.memfd_create("encode") if hasattr(os, "memfd_create") else None
    with io.BytesIO() if memory is None else open(memory, "w+b", buffering=0) as file:
        Image.fromarray(pixels).save(
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
