"""The Python interface of the crop decoder (`native/crop_decoder.cpp`). Its calls run without the GIL.

    stored images, crop boxes, flips --(Decoder.submit)--> Job --(wait)--> uint8 (B, height, width, 3), a status each

The library is built when the package is installed and may be missing. `available()` tells whether it can be used, and
`load()` raises an error with the reason if it cannot.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any, Final

import numpy as np

from sdpnet.pipelines.native.library import NativeLibrary, library_path

__all__ = [
    "FILE_DTYPE",
    "Decoder",
    "Job",
    "available",
    "decode_whole",
    "guard_again",
    "guard_mapping",
    "load",
    "mapping_is_damaged",
    "release_mapping",
]

_DONE, _NOT_YET, _BAD_SAMPLE, _SHORT_OF_MEMORY, _OTHER_PROCESS = range(5)  # the library's Answer
_MESSAGE_BYTES: Final = 200

# An image that is read from a file: the addresses of its folder's path and of its name, which are C strings, the
# position of its first byte, and the file's size and modification time (-2^63: any). A `folder` of 0: the image is in
# memory.
FILE_DTYPE: Final = np.dtype(
    [("folder", "=u8"), ("name", "=u8"), ("offset", "=u8"), ("size", "=i8"), ("mtime_ns", "=i8")]
)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_uint64),
        ("addresses", ctypes.c_void_p),
        ("files", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("image_sizes", ctypes.c_void_p),
        ("boxes", ctypes.c_void_p),
        ("raw", ctypes.c_void_p),
        ("flips", ctypes.c_void_p),
        ("out_height", ctypes.c_uint32),
        ("out_width", ctypes.c_uint32),
        ("output", ctypes.c_void_p),
        ("statuses", ctypes.c_void_p),
        ("messages", ctypes.c_void_p),
    )


class Job:
    """One batch that is being decoded. Its outputs are written until it is done or released.

    Attributes:
        statuses: int32 (B,), numbers of `sdpnet.pipelines.native.status.Status`.
    """

    def __init__(self, decoder: Decoder, output: np.ndarray, files: np.ndarray | None) -> None:
        # The library itself sets and clears the handle, so that an interrupt cannot separate a job from its handle.
        self._handle = ctypes.c_void_p()
        self._decoder = decoder
        self._output = output  # kept alive, because the threads write into it
        self._files = files  # kept alive, because the names may lie behind it
        self.statuses = np.zeros(len(output), np.int32)
        self._messages = np.zeros(len(output), f"S{_MESSAGE_BYTES}")

    def wait(self, timeout_ms: int) -> bool:
        """Waits for at most `timeout_ms` milliseconds. Returns whether all samples are done."""
        return _answer(load().decoder_wait(self._decoder.handle, self._handle, timeout_ms)) == _DONE

    def message(self, sample: int) -> str:
        """The reason why a sample of the batch has a status other than `Status.OK`, as part of a sentence."""
        return bytes(self._messages[sample]).decode("utf-8", "replace")

    def release(self) -> None:
        """Cancels samples that were not started and waits for the others. Nothing is written afterwards."""
        if self._handle and not self._decoder.closed:
            load().decoder_release(self._decoder.handle, ctypes.byref(self._handle))

    def __del__(self) -> None:
        self.release()


class Decoder:
    """A fixed set of threads that decode batches, oldest first. The results do not depend on the number of threads."""

    def __init__(self, threads: int) -> None:
        assert threads >= 1
        library = load()
        handle = library.decoder_create(threads)
        if not handle:
            raise MemoryError(f"no memory or no threads left for {threads} decoding threads (see ulimit -u)")
        self._handle = handle
        self._close = weakref.finalize(self, library.decoder_destroy, handle)  # runs also when the interpreter exits

    @property
    def closed(self) -> bool:
        return not self._close.alive

    @property
    def handle(self) -> int:
        if self.closed:
            raise RuntimeError("the decoder is closed")
        return self._handle

    def submit(
        self,
        addresses: np.ndarray,
        nbytes: np.ndarray,
        image_sizes: np.ndarray,
        boxes: np.ndarray,
        raw: np.ndarray,
        flips: np.ndarray,
        output: np.ndarray,
        files: np.ndarray | None = None,
    ) -> Job:
        """Queues a batch of B samples.

        Args:
            addresses: uint64 (B,), the addresses of the stored images in memory. The memory must stay valid until the
                job is released.
            nbytes: int64 (B,), the number of bytes of each image.
            image_sizes: int32 (B, 2), height and width in pixels. A JPEG of another size counts as damaged.
            boxes: int32 (B, 4), crop boxes (top, left, height, width) in source pixels.
            raw: bool (B,), whether an image is stored as pixels, uint8 RGB (height, width, 3), instead of as a JPEG.
            flips: bool (B,), whether to mirror left-right.
            output: uint8 (B, height, width, 3) in C order. It gets the resized crops, and zeros for samples that cannot
                be decoded.
            files: `FILE_DTYPE` (B,), the images that are read from files, whose addresses do not matter. The names must
                stay valid until the job is released. An image whose file is missing or is not the described one gets
                `Status.NO_FILE`. None if all images are in memory.

        Raises:
            ValueError: a box is not inside its image, or an array is not as described.
            RuntimeError: the decoder is closed, or was made by the process that this one was forked from.
        """
        count = len(output)
        batch = _Batch(
            count,
            _address(addresses, np.uint64, (count,)),
            None if files is None else _address(files, FILE_DTYPE, (count,)),
            _address(nbytes, np.int64, (count,)),
            _address(image_sizes, np.int32, (count, 2)),
            _address(boxes, np.int32, (count, 4)),
            _address(raw, np.bool_, (count,)),
            _address(flips, np.bool_, (count,)),
            *output.shape[1:3],
            _address(output, np.uint8, (*output.shape[:3], 3)),
        )
        job = Job(self, output, files)
        batch.statuses, batch.messages = job.statuses.ctypes.data, job._messages.ctypes.data
        bad = ctypes.c_uint64()
        pointers = (ctypes.byref(part) for part in (batch, job._handle, bad))
        if _answer(load().decoder_submit(self.handle, *pointers)) == _BAD_SAMPLE:
            box, size = boxes[bad.value].tolist(), image_sizes[bad.value].tolist()
            raise ValueError(f"sample {bad.value} of the batch: the box {box} is not inside its image of {size} pixels")
        return job

    def read_ahead(self, addresses: np.ndarray, nbytes: np.ndarray, files: np.ndarray | None = None) -> None:
        """Reads parts of mapped files, and images in files of their own, into memory, in threads of their own.

        Args:
            addresses: uint64 (N,), the addresses of the parts.
            nbytes: int64 (N,), the number of bytes of each part or image.
            files: as in `submit`. The names are copied.
        """
        count = len(addresses)
        at, sizes = _address(addresses, np.uint64, (count,)), _address(nbytes, np.int64, (count,))
        described = None if files is None else _address(files, FILE_DTYPE, (count,))
        _answer(load().decoder_read_ahead(self.handle, count, at, sizes, described))

    def close(self) -> None:
        """Cancels all jobs, waits for samples that are being decoded, and ends the threads."""
        self._close()


def available() -> bool:
    """Whether the library exists, was built by this version of the package, and can be loaded."""
    return LIBRARY.available()


def load() -> ctypes.CDLL:
    """Returns the loaded library. Raises `OSError` with the reason if it cannot be used."""
    return LIBRARY.load()


def decode_whole(encoded: np.ndarray, height: int, width: int) -> tuple[int, str, np.ndarray]:
    """Decodes a whole JPEG file in the calling thread, without a `Decoder`.

    Args:
        encoded: uint8 (n,), the file.
        height, width: the image's size in pixels.

    Returns:
        its `Status`, the message (empty for `Status.OK`), and its pixels, uint8 (height, width, 3).
    """
    output, message = np.zeros((height, width, 3), np.uint8), ctypes.create_string_buffer(_MESSAGE_BYTES)
    encoded = np.ascontiguousarray(encoded)
    arguments = encoded.ctypes.data, len(encoded), height, width, output.ctypes.data, message
    status = load().decoder_decode(*arguments)
    return status, message.value.decode("utf-8", "replace"), output


def guard_mapping(address: int, size: int) -> int | None:
    """Guards a mapped file: reads that the system cannot answer give zeros instead of ending the process.

    A file that is cut while it is mapped causes such reads.

    Returns:
        a number for `mapping_is_damaged`, which tells whether that has happened, and for `release_mapping`, which must
        be called before the memory is used for something else. None if too many files are guarded already.
    """
    number = load().mapping_guard(address, size)
    return None if number < 0 else number


def guard_again() -> None:
    """Installs the signal handler of `guard_mapping` again, after another library has replaced it."""
    load().mapping_guard_again()


def mapping_is_damaged(number: int) -> bool:
    """Whether a guarded mapping has given zeros for a read that the system could not answer."""
    return bool(load().mapping_is_damaged(number))


def release_mapping(number: int) -> None:
    """Ends the guard of a mapping."""
    load().mapping_release(number)


def _declare(library: Any) -> None:
    pointer, unsigned = ctypes.c_void_p, ctypes.c_uint32
    library.decoder_create.argtypes, library.decoder_create.restype = (unsigned,), pointer
    library.decoder_destroy.argtypes, library.decoder_destroy.restype = (pointer,), None
    library.decoder_submit.argtypes = (pointer,) * 4
    library.decoder_wait.argtypes = (pointer, pointer, unsigned)
    library.decoder_release.argtypes, library.decoder_release.restype = (pointer, pointer), None
    library.decoder_read_ahead.argtypes = (pointer, ctypes.c_uint64, pointer, pointer, pointer)
    unsigned64 = ctypes.c_uint64
    library.decoder_decode.argtypes = (pointer, unsigned64, unsigned, unsigned, pointer, pointer)
    library.mapping_guard.argtypes = (ctypes.c_uint64, ctypes.c_uint64)


LIBRARY = NativeLibrary(library_path(os.path.dirname(__file__), "crop_decoder"), ("decoder_interface", 3), _declare)


def _address(array: np.ndarray, dtype: type[np.generic] | np.dtype, shape: tuple[int, ...]) -> int:
    """The address of an array's data. Raises `ValueError` for another dtype, shape or order."""
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"got {array.dtype} {array.shape}, need {np.dtype(dtype)} {shape} in C order")
    return array.ctypes.data


def _answer(answer: int) -> int:
    """Returns the library's answer, or raises the error that it stands for."""
    if answer == _SHORT_OF_MEMORY:
        raise MemoryError("the crop decoder has no memory left")
    if answer == _OTHER_PROCESS:
        raise RuntimeError("the decoder belongs to the process that this one was forked from: make another one here")
    return answer
