"""A worker process: receives the locations of images and answers with encoded images until its parent ends.

    socket          from the parent: settings, then locations; to the parent: images too large for the shared memory
    pipe            to the parent: a byte with the number of images finished since the last byte; 0 when ready to begin
    shared memory   the number of finished images, an answer for each of the last ones, and the images

Images come back through shared memory because pipes and pickles cost 0.5 ms an image in the parent, and shared memory
0.3 ms including start and checksum. The parent is notified of several images at once, which saves system calls in both
processes. Answer and count are nevertheless written as soon as an image is finished: if the process crashes at the next
image, the parent still finds all finished ones.

The module imports as little as possible, because a process takes as long to start as to convert some hundred images.
"""

from __future__ import annotations

import ctypes
import gc
import marshal
import mmap
import os
import signal
import struct
import sys
import time
import warnings
from contextlib import suppress
from typing import Any, BinaryIO, Final

from zlib_ng import zlib_ng

from sdpnet.pipelines.errors import UserError, printable
from sdpnet.preprocess.encoding import jpeg
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.preprocess.sources.files.location import MachineError
from sdpnet.preprocess.sources.parquet.row import ImageLocation, location_of
from sdpnet.preprocess.workers.result import Bad, Encoded, ImageState

__all__ = [
    "ANSWER",
    "ANSWERS_START",
    "COUNT",
    "IMAGES_START",
    "MESSAGE",
    "NUM_ANSWERS",
    "SHARED_BYTES",
    "encode_one",
    "work",
]

_JPEG_SUFFIXES: Final = (".jpeg", ".jpg")
# The parent is notified after _NOTIFY_IMAGES finished images, or earlier if _NOTIFY_SECONDS have passed.
_NOTIFY_IMAGES: Final = 4
_NOTIFY_SECONDS: Final = 0.004

MESSAGE: Final = struct.Struct("<I")  # the size of a message on the socket, which precedes it; messages are marshalled

# The layout of the shared memory. COUNT: the number of images finished since the start. ANSWER: state, whether the
# image comes through the socket, height, width, size, CRC-32, and the end of the image in the ring buffer. The end is
# counted since the start, without wrapping around. For a bad image, its reason takes the place of the image.
COUNT: Final = struct.Struct("<Q")
ANSWER: Final = struct.Struct("<B?HHIIQ")
ANSWERS_START: Final = 64
NUM_ANSWERS: Final = 64  # more than the number of images that are assigned to a worker at a time
IMAGES_START: Final = 4096
SHARED_BYTES: Final = 1 << 24  # the size of the ring buffer for images, for each worker


def encode_one(location: ImageLocation, settings: EncodeSettings) -> Encoded | Bad:
    """Reads and encodes one image. Any error of the image becomes the reason of a `Bad`.

    Raises:
        ImportError, MachineError: the error does not concern the image.
    """
    try:
        image = encode_image(location.read(settings.max_file_mb * 1_000_000), settings, location.name)
    except UserError as error:
        return Bad(str(error).removeprefix(f"{printable(location.name)}: "))
    except (ImportError, MachineError):  # for example no memory for a library, or too many open files
        raise
    except Exception as error:  # an error in our code or in a library must not end the conversion of all other images
        return Bad(f"cannot be converted ({type(error).__name__}: {' '.join(str(error).split())})")
    return Encoded(image.data, image.height, image.width, image.kept, zlib_ng.crc32(image.data))


class _Answers:
    """Passes finished images to the parent, through the shared memory and the descriptors."""

    def __init__(self, tasks: int, notices: int, shared: int) -> None:
        self._tasks, self._notices = tasks, notices
        self._shared = memoryview(mmap.mmap(shared, IMAGES_START + SHARED_BYTES))
        self._count = self._notified = self._used = 0
        self._time = 0.0

    def begin(self) -> None:
        """Must be called before the first image of a message, to start the clock of the notices."""
        self._time = time.monotonic()

    def add(self, result: Encoded | Bad, freed: int) -> None:
        """Adds a finished image. The parent has released the ring buffer up to the position `freed`."""
        if isinstance(result, Bad):
            data: bytes | memoryview = result.reason.encode(errors="surrogateescape")
            state, height, width, crc32 = ImageState.BAD, 0, 0, 0
        else:
            data, height, width, _, crc32 = result
            state = result.state
        size = len(data)
        start = self._used
        if start % SHARED_BYTES + size > SHARED_BYTES:  # an image must not wrap around, so it starts at the beginning
            start = -(-start // SHARED_BYTES) * SHARED_BYTES
        fits = start + size - freed <= SHARED_BYTES
        if fits:
            self._used = start + size
            place = IMAGES_START + start % SHARED_BYTES
            self._shared[place : place + size] = data
        place = ANSWERS_START + self._count % NUM_ANSWERS * ANSWER.size
        ANSWER.pack_into(self._shared, place, state, not fits, height, width, size, crc32, self._used)
        self._count += 1
        COUNT.pack_into(self._shared, 0, self._count)
        now = time.monotonic()
        if self._count - self._notified >= _NOTIFY_IMAGES or now - self._time > _NOTIFY_SECONDS or not fits:
            self.notify()
            self._time = now
        if not fits:
            view = memoryview(data)
            while view:
                view = view[os.write(self._tasks, view) :]

    def notify(self) -> None:
        """Notifies the parent of all finished images."""
        if self._count > self._notified:
            self.write_notice(self._count - self._notified)
            self._notified = self._count

    def write_notice(self, number: int) -> None:
        """Notifies the parent of so many finished images; 0 means that the worker is ready."""
        os.write(self._notices, bytes([number]))


def _receive(tasks: BinaryIO) -> Any:
    """Reads a message. Raises EOFError if the parent has ended."""
    header = tasks.read(MESSAGE.size)
    if len(header) < MESSAGE.size:
        raise EOFError
    return marshal.loads(tasks.read(MESSAGE.unpack(header)[0]))


def work(tasks_descriptor: int, notices_descriptor: int, shared_descriptor: int) -> None:
    """The main function of a worker process. The arguments are the descriptors of socket, pipe and shared memory.

    If the process cannot continue, it prints the reason in one line and ends with status 1.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    try:
        _work(tasks_descriptor, notices_descriptor, shared_descriptor)
    except (ImportError, MemoryError, OSError) as error:
        reason = " ".join(str(error).split()) or "out of memory"
        sys.stderr.write(f"a worker process: {type(error).__name__}: {printable(reason)}\n")
        raise SystemExit(1) from None


def _work(tasks_descriptor: int, notices_descriptor: int, shared_descriptor: int) -> None:
    with (
        suppress(EOFError, BrokenPipeError, ConnectionResetError),
        open(tasks_descriptor, "rb", 1 << 16, closefd=False) as tasks,
    ):
        values, parent = _receive(tasks)
        settings = EncodeSettings(*values)
        with suppress(OSError, AttributeError):  # Linux kills a worker that hangs when its parent is killed
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            return
        warnings.simplefilter("ignore")
        answers = _Answers(tasks_descriptor, notices_descriptor, shared_descriptor)
        message = _receive(tasks)
        if not jpeg.available() or not all(name.lower().endswith(_JPEG_SUFFIXES) for name, *_ in message[1]):
            from sdpnet.pipelines.images import file as image_file  # noqa: F401 - imported before the time limits apply
        gc.freeze()
        answers.write_notice(0)
        while True:
            freed, locations = message
            answers.begin()
            for location in locations:
                answers.add(encode_one(location_of(location), settings), freed)
            answers.notify()
            message = _receive(tasks)
