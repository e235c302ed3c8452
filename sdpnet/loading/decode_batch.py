"""The decoder alone: image files become a batch of crops of one size.

files -> size from the header -> crop boxes -> the native decoder's threads -> uint8 (B, S, S, 3)
         other kinds than common JPEGs: `decode_image` first, then only crop and resize
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, cast

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

from sdpnet.loading.arguments import integer_from
from sdpnet.pipelines.errors import ImageFileError, UserError, printable, require
from sdpnet.pipelines.files.regular import NotRegularError, open_regular_file
from sdpnet.pipelines.images.file import decode_image
from sdpnet.pipelines.images.jpeg_frame import frame_of
from sdpnet.pipelines.images.kinds import MAX_PIXELS
from sdpnet.pipelines.machine import core_share
from sdpnet.pipelines.native import decoder as native_decoder
from sdpnet.pipelines.native.status import Status
from sdpnet.pipelines.options import LARGEST_IMAGE
from sdpnet.pipelines.planning.crop_boxes import centre_crops

__all__ = ["decode_batch"]

ImageFile = bytes | bytearray | memoryview | str | os.PathLike[str] | np.ndarray | torch.Tensor

_JPEG: Final = b"\xff\xd8\xff"
_MAX_THREADS: Final = 4096
_WAIT_MS: Final = 50  # Python handles Ctrl-C between two waits
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def decode_batch(
    images: Sequence[ImageFile],
    image_size: int = 224,
    *,
    boxes: np.ndarray | torch.Tensor | Sequence[Sequence[int]] | None = None,
    flips: np.ndarray | torch.Tensor | Sequence[bool] | None = None,
    centre_fraction: float = 0.875,
    num_threads: int = 0,
    on_error: Literal["raise", "mask"] = "raise",
) -> torch.Tensor:
    """Decodes image files, and crops, resizes and flips them as the pipeline `native` does.

    JPEGs are decoded by the native decoder, in threads and only where the crop is; other images (PNG, WebP, AVIF, TIFF
    and more) as a conversion decodes them. Without the native decoder, torchvision crops and resizes. An EXIF
    orientation is ignored.

    Args:
        images: the files: their bytes, as `bytes` or as one-dimensional uint8 arrays or tensors, or their paths.
        image_size: pixels a side of the result, 8 to 4,096.
        boxes: int (B, 4), the crop (top, left, height, width) of each image in its pixels. None is the central square
            as in evaluation.
        flips: bool (B,), whether to mirror an image left-right; None is never.
        centre_fraction: the share of the shorter side that the central square keeps, in (0, 1].
        num_threads: the number of threads; 0 is one for each core that this process may use.
        on_error: what an image that cannot be decoded leads to: "raise" is an error, "mask" a black image.

    Returns:
        uint8 (B, image_size, image_size, 3), RGB, values 0 to 255, on the CPU.

    Raises:
        UserError: an argument is not valid, a box is not inside its image, or an image cannot be read or decoded. The
            message names the image by its path, or by its place in `images`.
    """
    size, threads = integer_from("image_size", image_size), integer_from("num_threads", num_threads, 0) or core_share()
    require(8 <= size <= LARGEST_IMAGE, "image_size", size, f"8 to {LARGEST_IMAGE:,} pixels")
    require(threads <= _MAX_THREADS, "num_threads", threads, f"at most {_MAX_THREADS:,}")
    require(on_error in ("raise", "mask"), "on_error", on_error, "raise or mask")
    is_number = isinstance(centre_fraction, (int, float)) and not isinstance(centre_fraction, bool)
    require(is_number and 0 < centre_fraction <= 1, "centre_fraction", centre_fraction, "in (0, 1]")
    if isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike)) or not isinstance(images, Iterable):
        raise UserError("images: must be a list of files (their bytes or paths), not one of them; write [image]")
    images = list(images)
    names = [_name(image, place) for place, image in enumerate(images)]
    wanted = _Wanted(
        names=names,
        boxes=_array("boxes", boxes, np.int64, (len(names), 4)),
        flips=_array("flips", flips, np.bool_, (len(names),)),
        centre_fraction=centre_fraction,
        output=torch.zeros(len(names), size, size, 3, dtype=torch.uint8),
    )
    native = native_decoder.available()
    with ThreadPoolExecutor(max(1, min(threads, len(names))), "decode") as pool:
        files = _attempt(pool, lambda image: _open(image, native), images)
        jpegs = [i for i, file in enumerate(files) if isinstance(file, _File) and not file.is_raw]
        # The decoder for all kinds decodes what the native one refused, or says why it cannot be decoded.
        refused = wanted.decode(jpegs, files, threads) if jpegs else []
        for i, file in zip(refused, _attempt(pool, _decode_whole, [files[i] for i in refused]), strict=True):
            files[i] = file
        raws = [i for i, file in enumerate(files) if isinstance(file, _File) and file.is_raw]
        if raws and native:
            wanted.decode(raws, files, threads)
        elif raws:
            wanted.crop(raws, files, pool)
    for name, file in zip(names, files, strict=True):
        if isinstance(file, UserError) and on_error == "raise":
            raise UserError(f"{name}: {file}")
    return wanted.output


@dataclass(frozen=True)
class _File:
    """A file, or its pixels.

    Attributes:
        data: uint8 (n,), a JPEG file, or the pixels (height, width, 3).
        size: height and width in pixels.
        is_raw: whether `data` are pixels.
    """

    data: np.ndarray
    size: tuple[int, int]
    is_raw: bool


@dataclass(frozen=True)
class _Wanted:
    """What is wanted of each image, and where it goes.

    Attributes:
        names: the images' names in messages.
        boxes: int64 (B, 4), or None for central squares.
        flips: bool (B,), or None.
        centre_fraction: the share of the shorter side that a central square keeps.
        output: uint8 (B, size, size, 3).
    """

    names: list[str]
    boxes: np.ndarray | None
    flips: np.ndarray | None
    centre_fraction: float
    output: torch.Tensor

    def crops(self, places: list[int], files: list[_File]) -> tuple[np.ndarray, np.ndarray]:
        """The boxes, int32 (n, 4), and flips, bool (n,), of the files at some places.

        Raises `UserError` if a box is not inside its image.
        """
        sizes = np.array([file.size for file in files], np.int64)
        flips = np.zeros(len(places), np.bool_) if self.flips is None else self.flips[places]
        if self.boxes is None:
            return centre_crops(sizes, self.centre_fraction), flips
        boxes = self.boxes[places]
        starts, extents = boxes[:, :2], boxes[:, 2:]
        inside = ((starts >= 0) & (extents > 0) & (extents <= sizes) & (starts <= sizes - extents)).all(axis=1)
        if not inside.all():
            first = int(np.flatnonzero(~inside)[0])
            box, (height, width) = tuple(boxes[first].tolist()), sizes[first].tolist()
            name = self.names[places[first]]
            raise UserError(f"{name}: the box {box} is not inside the image of {height} x {width} pixels")
        return boxes.astype(np.int32), flips

    def decode(self, places: list[int], opened: Sequence[_File | UserError], threads: int) -> list[int]:
        """Decodes or only crops files by the native decoder. Returns the places of those that it refuses."""
        files = [cast(_File, opened[i]) for i in places]
        boxes, flips = self.crops(places, files)
        everything = len(places) == len(self.output)
        output = self.output if everything else torch.empty(len(places), *self.output.shape[1:], dtype=torch.uint8)
        decoder = native_decoder.Decoder(min(threads, len(places)))
        try:
            job = decoder.submit(
                np.array([file.data.ctypes.data for file in files], np.uint64),
                np.array([len(file.data) for file in files], np.int64),
                np.array([file.size for file in files], np.int32),
                np.ascontiguousarray(boxes),
                np.array([file.is_raw for file in files], np.bool_),
                np.ascontiguousarray(flips),
                output.numpy(),
            )
            while not job.wait(_WAIT_MS):
                pass
            job.release()
        finally:
            decoder.close()
        if (job.statuses == Status.NO_MEMORY).any():
            raise MemoryError("no memory left for decoding: lower num_threads")
        if not everything:
            self.output[places] = output
        return [places[i] for i in np.flatnonzero(job.statuses != Status.OK).tolist()]

    def crop(self, places: list[int], opened: Sequence[_File | UserError], pool: ThreadPoolExecutor) -> None:
        """Crops and resizes pixels by torchvision."""
        files = [cast(_File, opened[i]) for i in places]
        size = self.output.shape[1]

        def one(file: _File, box: np.ndarray, flip: bool) -> torch.Tensor:
            pixels = torch.from_numpy(file.data.reshape(*file.size, 3)).permute(2, 0, 1)
            mode = InterpolationMode.BILINEAR
            crop = resized_crop(pixels, *box.tolist(), [size, size], interpolation=mode, antialias=True)
            return (horizontal_flip(crop) if flip else crop).permute(1, 2, 0)

        for i, result in zip(places, pool.map(one, files, *self.crops(places, files)), strict=True):
            self.output[i] = result


def _name(image: object, place: int) -> str:
    """The name of an image in messages."""
    return printable(image) if isinstance(image, (str, os.PathLike)) else f"image {place}"


def _attempt(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Sequence[_Item]
) -> list[_Result | UserError]:
    """The results of a function, with the errors of items that fail."""

    def call(item: _Item) -> _Result | UserError:
        try:
            return function(item)
        except UserError as error:
            return error
        except MemoryError:
            return UserError("too large for the memory that is left; reduce it")

    return list(pool.map(call, items))


def _open(image: ImageFile, native: bool) -> _File:
    """Reads a file, and decodes it unless it is a JPEG that the native decoder supports."""
    data = _bytes_of(image)
    if native and data[:3].tobytes() == _JPEG:
        frame = frame_of(data.tobytes())
        if frame is not None and frame.is_common and 0 < frame.height * frame.width <= MAX_PIXELS:
            return _File(data, (frame.height, frame.width), is_raw=False)
    return _decoded(data)


def _decode_whole(file: Any) -> _File:
    return _decoded(file.data)


def _decoded(data: np.ndarray) -> _File:
    pixels = decode_image(data.tobytes())
    return _File(pixels.reshape(-1), (pixels.shape[0], pixels.shape[1]), is_raw=True)


def _bytes_of(image: ImageFile) -> np.ndarray:
    """The bytes of a file: uint8 (n,). Raises `UserError` without the file's name."""
    if isinstance(image, (str, os.PathLike)):
        try:
            with open(open_regular_file(image), "rb") as file:
                return np.frombuffer(file.read(), np.uint8)
        except NotRegularError as error:
            raise ImageFileError(f"is {error.kind}, not a file") from None
        except (OSError, ValueError) as error:  # ValueError: the name has a null byte
            raise ImageFileError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, (bytes, bytearray, memoryview)):
        return np.frombuffer(image, np.uint8)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 1:
        return np.ascontiguousarray(image)
    shown = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise UserError(f"is {shown}: must be a file's bytes, a uint8 array (n,) of them, or a path")


def _array(name: str, values: Any, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray | None:
    """An argument as an array of this dtype and shape. Raises `UserError` if it is another one."""
    if values is None:
        return None
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    kinds = "b" if dtype is np.bool_ else "iu"
    if array.shape != shape or (array.dtype.kind not in kinds and array.size):
        kind = "bool" if dtype is np.bool_ else "int"
        raise UserError(f"{name} = {array.dtype} {array.shape}: must be {kind} {shape}, one for each image")
    return array.astype(dtype)
