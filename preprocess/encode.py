"""Turns any image file into the JPEG that is stored.

    the file's bytes -> decode -> RGB -> area averaging down to max_side -> baseline JPEG

By default with a restart marker at each MCU row, so that a decoder can start at the first row of a crop.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.errors import UserError
from preprocess.listing import Location, SplitScan

__all__ = ["SUBSAMPLINGS", "EncodeSettings", "EncodedImage", "encode_image", "encode_split"]

# What Pillow may try, whatever the suffix says. Other formats start programs (EPS: Ghostscript).
FORMATS: Final = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF")
JPEG_MAX_SIDE: Final = 65_500  # libjpeg's JPEG_MAX_DIMENSION; a .beton would hold 65,535
SUBSAMPLINGS: Final = ("4:4:4", "4:2:2", "4:2:0")


@dataclass(frozen=True)
class EncodeSettings:
    """How images are stored.

    Attributes:
        max_side: the longer side is reduced to this many pixels; 0 keeps every image's size. Never enlarged.
        quality: libjpeg's, 1 to 100.
        subsampling: of the chroma planes, "4:4:4", "4:2:2" or "4:2:0".
        restart_rows: MCU rows between restart markers; 0 writes none.

    Raises `UserError` for a value out of range.
    """

    max_side: int = 500
    quality: int = 90
    subsampling: str = "4:2:0"
    restart_rows: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.max_side <= JPEG_MAX_SIDE:
            raise UserError(f"max_side {self.max_side}: must be 1 to {JPEG_MAX_SIDE}, or 0 to keep every size")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality}: must be 1 to 100")
        if self.subsampling not in SUBSAMPLINGS:
            raise UserError(f"subsampling {self.subsampling!r}: must be one of {', '.join(SUBSAMPLINGS)}")
        if not 0 <= self.restart_rows <= 65_535:
            raise UserError(f"restart_rows {self.restart_rows}: must be 0 to 65535")


@dataclass(frozen=True)
class EncodedImage:
    """A baseline JPEG file's bytes and its size in pixels."""

    data: bytes
    height: int
    width: int


def encode_image(
    source: bytes | str | os.PathLike[str], settings: EncodeSettings, name: str | None = None
) -> EncodedImage:
    """Encodes one image as it is stored.

    The colours are those of torchvision's `default_loader`, Pillow's `convert("RGB")`: an alpha channel is
    dropped, not composited, and CMYK is converted without its profile. One difference: greyscale of 16 bits
    is scaled to 8, where `convert` clips. Only the first frame of an animation is kept. The EXIF orientation
    is ignored, as is the custom for ImageNet, and no metadata is kept. Equal inputs give equal bytes (with
    the same Pillow and libjpeg-turbo).

    Args:
        source: the file's bytes, or its path.
        settings: how to store it.
        name: what an error calls the image; a path's default is the path itself.

    Raises:
        UserError: with the image's name, when it cannot be read, is empty, no image, truncated or otherwise
            damaged, a decompression bomb (over 178,956,970 pixels), or too long for a JPEG.
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
    image = _decode(data, name)
    width, height = _fit(image.width, image.height, settings.max_side)
    if max(width, height) > JPEG_MAX_SIDE:
        raise UserError(f"{name}: {width} x {height} pixels, but a JPEG has at most {JPEG_MAX_SIDE}; set --max-side")
    if (width, height) != image.size:
        image = Image.fromarray(_average(np.asarray(image), height, width))
    return EncodedImage(_save(image, settings), height, width)


def encode_split(
    split: SplitScan, settings: EncodeSettings, num_workers: int
) -> Generator[EncodedImage | UserError, None, None]:
    """Encodes all images of a split with `num_workers` threads and yields them in the split's order.

    In the place of an image that cannot be encoded comes the error that `encode_image` raised, for the consumer to
    decide about. At most 8 images a worker are in flight, whatever the consumer does. Close the generator
    (`contextlib.closing`) to stop early: what is in flight is then waited for or dropped.
    """

    def encode(location: Location) -> EncodedImage | UserError:
        try:
            return encode_image(location.read(), settings, location.name)
        except UserError as error:
            return error

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")
    pending: deque[Future[EncodedImage | UserError]] = deque()
    try:
        for index in range(split.num_images):
            pending.append(pool.submit(encode, split.locate(index)))
            if len(pending) >= 8 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(data: bytes, name: str) -> Image.Image:
    """The image as mode RGB, fully loaded."""
    if not data:
        raise UserError(f"{name}: empty (0 bytes); copy it again or remove it")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = _from_16_bits(image, name)
        elif image.mode == "F":
            raise UserError(f"{name}: floating-point pixels of unknown range; convert it to 8 or 16 bits")
        image.info.clear()  # else Pillow keeps the comment, and warns about a palette's transparency
        return image if image.mode == "RGB" else image.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError:
        message = f"{name}: not an image (none of {', '.join(FORMATS)}); replace or remove it"
        raise UserError(message) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name}: too large to decode safely ({error}); reduce or remove it") from None
    except Exception as error:  # Pillow's readers raise almost any type on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: damaged image ({reason}); copy it again, replace or remove it") from error


def _from_16_bits(image: Image.Image, name: str) -> Image.Image:
    # Pillow gives 16-bit PGM and some TIFF files as mode I (int32), 16-bit PNG as I;16.
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65_535:
        raise UserError(f"{name}: greyscale values beyond 16 bits; convert it to 8 or 16 bits")
    return Image.fromarray(((grey * 255 + 32_767) // 65_535).astype(np.uint8))


def _fit(width: int, height: int, max_side: int) -> tuple[int, int]:
    longest = max(width, height)
    if max_side == 0 or longest <= max_side:
        return width, height
    return tuple(max(1, (side * max_side + longest // 2) // longest) for side in (width, height))  # type: ignore[return-value]


def _average(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Reduces uint8 (H, W, 3) by exact area averaging, as OpenCV's INTER_AREA.

    Pillow's BOX filter does not weight the pixels that an output pixel covers in part: from 580 to 500 pixels
    it is off by 6 levels on average, which is nearest-neighbour's aliasing.
    """
    rows = _average_rows(pixels.reshape(len(pixels), -1), height).reshape(height, pixels.shape[1], 3)
    columns = np.ascontiguousarray(rows.transpose(1, 0, 2)).reshape(pixels.shape[1], -1)
    averaged = _average_rows(columns, width).reshape(width, height, 3)
    return (averaged.transpose(1, 0, 2) + np.float32(0.5)).astype(np.uint8)


def _average_rows(values: np.ndarray, size: int) -> np.ndarray:
    """Area averages of (length, n) along its first axis: float32 (size, n)."""
    length = len(values)
    edges = np.arange(size + 1) * length / size
    starts, ends = edges[:-1], edges[1:]
    first = np.floor(starts).astype(np.intp)
    num_taps = int((np.ceil(ends) - first).max())
    taps = first + np.arange(num_taps)[:, None]
    covered = np.minimum(ends, taps + 1) - np.maximum(starts, taps)
    weights = (np.clip(covered, 0, None) * size / length).astype(np.float32)
    taps = np.minimum(taps, length - 1)
    averaged = np.empty((size, values.shape[1]), np.float32)
    for begin in range(0, size, 32):  # blocks that stay in the cache: twice as fast as the whole at once
        block = slice(begin, begin + 32)
        np.multiply(values[taps[0, block]], weights[0, block, None], out=averaged[block])
        for tap, weight in zip(taps[1:, block], weights[1:, block], strict=True):
            averaged[block] += values[tap] * weight[:, None]
    return averaged


def _save(image: Image.Image, settings: EncodeSettings) -> bytes:
    """The image as a baseline JPEG with libjpeg's standard Huffman tables."""
    # Pillow releases the GIL while it encodes into a file descriptor, and holds it for BytesIO: about 1 ms an
    # image, which would limit many workers.
    memory = os.memfd_create("encode") if hasattr(os, "memfd_create") else None
    with io.BytesIO() if memory is None else open(memory, "w+b", buffering=0) as file:
        image.save(
            file,
            "JPEG",
            quality=settings.quality,
            subsampling=settings.subsampling,
            restart_marker_rows=settings.restart_rows,
            optimize=False,
            progressive=False,
        )
        file.seek(0)
        return file.read()
