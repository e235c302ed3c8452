"""Decodes any image file to 8-bit RGB. Conversion, prediction and everything else that reads image files use it.

    a file's bytes -> kind, by the first bytes -> metadata removed -> the kind's decoder -> 8 bits per sample -> RGB
                   -> turned upright, if requested

The colours are those of torchvision's `default_loader`, which are Pillow's `convert("RGB")`: an alpha channel is
dropped, not composited, and CMYK is converted without its profile. There are three differences: greyscale of 12 and 16
bits is scaled to 8 bits, where `convert` clips; JPEG 2000 files get the palette and the order of channels that they
declare; and samples without a known range (32-bit integers, signed integers, floating-point numbers) are refused. Only
the first frame or page of a file is read.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from sdpnet.pipelines.errors import ImageFileError
from sdpnet.pipelines.images.jp2_colours import bits_of, palette_of, rgb_order, with_ycc_as_rgb
from sdpnet.pipelines.images.jpeg_frame import Frame, frame_of
from sdpnet.pipelines.images.kinds import MAX_PIXELS, Kind, kind_of
from sdpnet.pipelines.images.metadata import without_metadata
from sdpnet.pipelines.images.picture import Picture, Pixels
from sdpnet.pipelines.images.reasons import damaged, out_of_memory, too_large, undecodable, unknown_range
from sdpnet.pipelines.images.tiff_directory import FLOAT, SIGNED, TiffImage, first_image
from sdpnet.pipelines.native.decoder import Decoder
from sdpnet.pipelines.native.decoder import available as native_is_built
from sdpnet.pipelines.native.status import Status

__all__ = ["FORMATS", "decode_image", "decode_reduced", "format_of", "is_upright"]

_LARGE_PIXELS: Final = 1 << 23
_MAX_SIDE: Final = 1 << 20  # reducing an image takes 12 bytes for each pixel of a row
# The only formats that Pillow is asked to open. Others start programs: EPS starts Ghostscript.
FORMATS: Final = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000")
_PILLOW_FEATURES: Final = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000", "JPEG": "jpg", "PNG": "zlib"}


def decode_image(data: bytes, *, exif: str = "ignore", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image file.

    Args:
        data: the whole file. Its content decides the format.
        exif: "ignore" returns the pixels as the file stores them, "apply" turns them upright as the file's EXIF
            orientation (for AVIF, its own properties) says. Unreadable EXIF data is ignored. A TIFF file's orientation
            is part of how it stores pixels and is always applied, as in Pillow.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        RGB, uint8 (height, width, 3), in memory of its own.

    Raises:
        ImageFileError: the file is empty, not an image, of a format that is not read, truncated or otherwise damaged,
            larger than `max_pixels`, or has samples without a known range. The message says which, and what to do.
    """
    return _read(data, exif, max_pixels, Picture.pixels)


def decode_reduced(data: bytes, max_side: int, *, exif: str = "ignore", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image file for a caller that reduces it afterwards so that no side is longer than `max_side`.

    Large images are returned already reduced, by `sdpnet.pipelines.images.area.average`, so that all of their pixels
    are never in memory as RGB. If `max_side` is 0, nothing is reduced. Otherwise as `decode_image`.
    """

    def take(picture: Picture) -> np.ndarray:
        is_large = picture.height * picture.width > _LARGE_PIXELS and max(picture.height, picture.width) > max_side > 0
        return picture.reduced(max_side) if is_large else picture.pixels()

    return _read(data, exif, max_pixels, take)


def format_of(data: bytes) -> str:
    """Pillow's name of a file's format, one of `FORMATS`. Raises `ImageFileError` for other files."""
    return str(_readable_kind(data).format)


def is_upright(data: bytes) -> bool:
    """Whether a file's EXIF orientation leaves its pixels as they are stored.

    It is True for files with unreadable EXIF data and for files that are not images.
    """
    kind = kind_of(data)
    with _without_warnings():
        return kind.format is None or _orientation_of(data, kind) == 1


def _readable_kind(data: bytes) -> Kind:
    """The kind of a file that can be decoded here. Raises `ImageFileError` for other files."""
    if not data:
        raise ImageFileError("empty (0 bytes); copy it again or remove it")
    kind = kind_of(data)
    if kind.format is None:
        raise ImageFileError(kind.refusal)
    part = _PILLOW_FEATURES.get(kind.format)
    if part is not None and not features.check(part):
        raise ImageFileError(
            f"{kind.name}, which this build of Pillow cannot decode: install Pillow's own wheel "
            "(pip install --force-reinstall --only-binary pillow pillow), or convert it to PNG or JPEG"
        )
    return kind


def _read(data: bytes, exif: str, max_pixels: int, take: Callable[[Picture], np.ndarray]) -> np.ndarray:
    """The result of `take` for the first frame."""
    if exif not in ("ignore", "apply"):
        raise ValueError(f"exif {exif!r}: must be ignore or apply")
    kind = _readable_kind(data)
    assert kind.format is not None
    with _without_warnings():
        orientation = _orientation_of(data, kind) if exif == "apply" else 1
        tiff = first_image(data) if kind.format == "TIFF" else None
        if tiff is not None:
            _require_range(tiff)
        frame = frame_of(data) if kind.format == "JPEG" else None
        try:
            return take(_picture(data, kind.format, tiff, frame, orientation, max_pixels))
        except ImageFileError:
            raise
        except MemoryError:
            raise out_of_memory() from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise too_large(error) from error
        except Exception as error:  # Pillow's readers raise almost any type on damaged files
            raise undecodable(error, kind, frame, tiff) from error


def _picture(
    data: bytes, format: str, tiff: TiffImage | None, frame: Frame | None, orientation: int, max_pixels: int
) -> Picture:
    """Decodes the first frame."""
    plain = without_metadata(data, format)
    if frame is not None and frame.is_common and (pixels := _decode_natively(plain, frame, max_pixels)) is not None:
        return Picture(Pixels(pixels), _to_rgb, orientation)
    if format == "JPEG2000":
        return _from_jpeg_2000(data, plain, orientation, max_pixels)
    image = _open(plain, format, max_pixels)
    if tiff is not None and tiff.is_planar and tiff.bits == 16 and tiff.channels > 1:
        _read_planes_of_16_bits(image, tiff)
    image.load()
    image.info.clear()  # otherwise Pillow keeps the comment, and warns about a palette's transparency
    return Picture(image, lambda piece: _to_rgb(piece, tiff), orientation)


def _require_size(width: int, height: int, max_pixels: int) -> None:
    """Raises `ImageFileError` for an image that is too large."""
    if width * height > max_pixels:
        limit = f"the limit of {max_pixels:,}" if max_pixels == MAX_PIXELS else f"the {max_pixels:,} of --max-pixels"
        raise too_large(f"{width * height:,} pixels, more than {limit}")
    if max(width, height) > _MAX_SIDE:
        raise too_large(f"{width:,} x {height:,} pixels, and a side has at most {_MAX_SIDE:,}")


def _decode_natively(data: bytes, frame: Frame, max_pixels: int) -> np.ndarray | None:
    """Decodes a JPEG with our own decoder, which detects damage that Pillow does not report.

    Returns None if the decoder is not built or does not support the image's colours.
    """
    if not native_is_built() or 0 in (frame.height, frame.width):
        return None
    _require_size(frame.width, frame.height, max_pixels)
    size, encoded = np.array([[frame.height, frame.width]], np.int32), np.frombuffer(data, np.uint8)
    pixels = np.zeros((1, frame.height, frame.width, 3), np.uint8)
    box, no = np.insert(size, 0, [[0], [0]], axis=1), np.zeros(1, np.bool_)
    decoder = Decoder(1)
    try:
        address = np.array([encoded.ctypes.data], np.uint64)
        job = decoder.submit(address, np.array([len(data)], np.int64), size, box, no, no, pixels)
        while not job.wait(1000):
            pass
        status, message = int(job.statuses[0]), job.message(0)
        job.release()
    finally:
        decoder.close()
    if status == Status.OK:
        return pixels[0]
    if status == Status.DAMAGED:
        raise damaged(message)
    if status == Status.TOO_LARGE:
        raise too_large(message)
    return None


def _open(data: bytes, format: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file of a given format. The pixels are not decoded yet."""
    assert format in FORMATS
    try:
        image = Image.open(io.BytesIO(data), formats=[format])
    except UnidentifiedImageError:
        open_format, _ = Image.OPEN[format]
        # Image.open gives no reason; the format's own reader raises an error with one.
        open_format(io.BytesIO(data), "")
        raise
    _require_size(*image.size, max_pixels)
    return image


def _to_rgb(image: Image.Image, tiff: TiffImage | None = None) -> Image.Image:
    """Converts an image of any mode to RGB. Raises `ImageFileError` for samples without a known range."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_8_bits(image, tiff)
    elif image.mode == "F":
        raise unknown_range("floating-point pixels")
    image.info.clear()
    return image if image.mode == "RGB" else image.convert("RGB")


def _require_range(tiff: TiffImage) -> None:
    """Raises `ImageFileError` unless the values for black and white of a TIFF file's samples are known."""
    if tiff.is_raw:
        raise ImageFileError("a camera's raw image (DNG or the like), which is not read: develop it to PNG or JPEG")
    if tiff.format == FLOAT:
        raise unknown_range("floating-point pixels")
    if tiff.format == SIGNED:
        raise unknown_range(f"signed {tiff.bits}-bit pixels")
    if tiff.bits > 16:
        raise unknown_range(f"{tiff.bits}-bit pixels")


def _to_8_bits(image: Image.Image, tiff: TiffImage | None) -> Image.Image:
    """Scales greyscale of more than 8 bits. Pillow opens 16-bit PGM files in mode I (int32), other files in I;16."""
    highest = 65_535 if tiff is None else (1 << tiff.bits) - 1
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > highest:
        raise ImageFileError(f"greyscale values beyond {highest.bit_length()} bits; convert it to 8 or 16 bits")
    if tiff is not None and tiff.white_is_zero:  # Pillow inverts only images of 8 bits or fewer
        grey = highest - grey
    return Image.fromarray(((grey * 255 + highest // 2) // highest).astype(np.uint8))


def _read_planes_of_16_bits(image: Image.Image, tiff: TiffImage) -> None:
    """Makes Pillow read uncompressed 16-bit planes correctly; it would take the first half of each for all of it."""
    order = "B" if tiff.is_big_endian else "L"
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:])) if tile.codec_name == "raw" else tile
        for tile in image.tile  # type: ignore[attr-defined]
    ]


def _from_jpeg_2000(data: bytes, plain: bytes, orientation: int, max_pixels: int) -> Picture:
    """Decodes `plain`, from which palette and channel definitions were removed, with those of `data`."""
    bits, palette = bits_of(data), palette_of(data)
    if len(bits) > 1 and max(bits) > 8:  # Pillow rounds 12 bits to 8, and 256 to 0
        what = f"a JPEG 2000 image of {len(bits)} channels of {max(bits)} bits"
        raise ImageFileError(f"{what}, which Pillow gets wrong where it is bright: convert it to 8 bits")
    order = rgb_order(data, len(bits)) if palette is None else None
    is_in_order = order is None or order == [0, 1, 2]
    ycc = None if is_in_order else with_ycc_as_rgb(plain)
    image = _open(ycc or plain, "JPEG2000", max_pixels)
    image.load()
    image.info.clear()

    def from_palette(piece: Image.Image) -> Image.Image:
        assert palette is not None
        indices = np.asarray(piece)
        indices = indices if indices.ndim == 2 else indices[..., 0]
        return Image.fromarray(palette[np.minimum(indices, len(palette) - 1)])

    def in_order(piece: Image.Image) -> Image.Image:
        ordered = np.asarray(piece)[..., order]
        if ycc is None:
            return Image.fromarray(np.ascontiguousarray(ordered))
        return _merged(ordered, "YCbCr").convert("RGB")

    if palette is not None:
        return Picture(image, from_palette, orientation)
    return Picture(image, _to_rgb if is_in_order or image.mode not in ("RGB", "RGBA") else in_order, orientation)


def _merged(channels: np.ndarray, mode: str) -> Image.Image:
    return Image.merge(mode, [Image.fromarray(np.ascontiguousarray(channels[..., i])) for i in range(3)])


def _orientation_of(data: bytes, kind: Kind) -> int:
    """A file's EXIF orientation, 1 to 8; 1 if there is none or the EXIF data is unreadable."""
    assert kind.format is not None
    if kind.format == "TIFF":  # Pillow turns it while loading
        return 1
    try:
        image = _open(without_metadata(data, kind.format, orientation=True), kind.format)
        if kind.format == "PNG":  # EXIF data may follow the pixels
            image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in range(1, 9) else 1
    except Exception:  # damaged EXIF data raises almost any type
        return 1


_silenced = 0  # the number of threads that are in `_without_warnings`
_lock = threading.Lock()
_restore = contextlib.ExitStack()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """A context without warnings: Pillow warns about odd files, and a caller's filter must not turn that into errors.

    Filters are global, so the first thread that enters changes them and the last one that leaves restores them.
    """
    global _silenced
    with _lock:
        if _silenced == 0:
            _restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _silenced += 1
    try:
        yield
    finally:
        with _lock:
            _silenced -= 1
            if _silenced == 0:
                _restore.close()
