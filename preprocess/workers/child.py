"""A worker process: takes locations of images and answers with images, until the other side has gone.

    socket          settings, then locations, and images that do not fit into the shared memory the other way
    pipe            a byte of news: so many more images are finished; 0 when it is ready to begin
    shared memory   how many are finished, an answer for each of the last ones, and the images

An answer and the count are there as soon as an image is finished, whatever happens to the process at the next one;
the news come for several images at once. It imports as little as it can: starting takes as long as converting some
hundred images.
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
from sdpnet.preprocess.sources.files.location import Location, MachineError
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
_NEWS_IMAGES: Final = 4  # finished images that a worker keeps to itself, and for how long
_NEWS_SECONDS: Final = 0.004

MESSAGE: Final = struct.Struct("<I")  # before each message of the socket: its size, in marshal's format

# The shared memory. Count: of all images that were ever finished. Answer: state, whether the image comes through the
# socket, height, width, size, CRC-32, and where the images' memory is used up to, counted on through all rounds. A bad
# image's reason lies in its place.
COUNT: Final = struct.Struct("<Q")
ANSWER: Final = struct.Struct("<B?HHIIQ")
ANSWERS_START: Final = 64
NUM_ANSWERS: Final = 64  # more than a worker has images in hand
IMAGES_START: Final = 4096
SHARED_BYTES: Final = 1 << 24  # of each worker, for images


def encode_one(location: Location, settings: EncodeSettings) -> Encoded | Bad:
    """Reads and encodes one image; whatever goes wrong is the image's reason.

    Raises ImportError or `MachineError` for what is not its fault.
    """
    try:
        image = encode_image(location.read(settings.max_file_mb * 1_000_000), settings, location.name)
    except UserError as error:
        return Bad(str(error).removeprefix(f"{printable(location.name)}: "))
    except (ImportError, MachineError):  # no memory for a library, no more open files: it says nothing of the image
        raise
    except Exception as error:  # a mistake of ours or of a library must not cost the other images
        return Bad(f"cannot be converted ({type(error).__name__}: {' '.join(str(error).split())})")
    return Encoded(image.data, image.height, image.width, image.kept, zlib_ng.crc32(image.data))


class _Answers:
    """The images that are finished, in the memory and through the descriptors that the parent process shares."""

    def __init__(self, tasks: int, news: int, shared: int) -> None:
        self._tasks, self._news = tasks, news
        self._shared = memoryview(mmap.mmap(shared, IMAGES_START + SHARED_BYTES))
        self._count = self._told = self._used = 0
        self._time = 0.0

    def begin(self) -> None:
        """Images come from now on."""
        self._time = time.monotonic()

    def add(self, result: Encoded | Bad, freed: int) -> None:
        """Another image is finished; the parent has given back the memory of those up to `freed`."""
        if isinstance(result, Bad):
            data: bytes | memoryview = result.reason.encode(errors="surrogateescape")
            state, height, width, crc32 = ImageState.BAD, 0, 0, 0
        else:
            data, height, width, _, crc32 = result
            state = result.state
        size = len(data)
        start = self._used
        if start % SHARED_BYTES + size > SHARED_BYTES:  # to the next round's start: an image lies in one piece
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
        if self._count - self._told >= _NEWS_IMAGES or now - self._time > _NEWS_SECONDS or not fits:
            self.tell()
            self._time = now
        if not fits:
            view = memoryview(data)
            while view:
                view = view[os.write(self._tasks, view) :]

    def tell(self) -> None:
        """Tells the parent of all that are finished."""
        if self._count > self._told:
            self.say(self._count - self._told)
            self._told = self._count

    def say(self, number: int) -> None:
        os.write(self._news, bytes([number]))


def _receive(tasks: BinaryIO) -> Any:
    """Raises EOFError when the other side has gone."""
    header = tasks.read(MESSAGE.size)
    if len(header) < MESSAGE.size:
        raise EOFError
    return marshal.loads(tasks.read(MESSAGE.unpack(header)[0]))


def work(tasks_descriptor: int, news_descriptor: int, shared_descriptor: int) -> None:
    """Runs in a process of its own, with the numbers of its socket, its pipe and the shared memory.

    Where that process cannot go on, it says why in a line and ends with status 1.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        _work(tasks_descriptor, news_descriptor, shared_descriptor)
    except (ImportError, MemoryError, OSError) as error:
        reason = " ".join(str(error).split()) or "out of memory"
        sys.stderr.write(f"a worker process: {type(error).__name__}: {printable(reason)}\n")
        raise SystemExit(1) from None


def _work(tasks_descriptor: int, news_descriptor: int, shared_descriptor: int) -> None:
    with (
        suppress(EOFError, BrokenPipeError, ConnectionResetError),
        open(tasks_descriptor, "rb", 1 << 16, closefd=False) as tasks,
    ):
        values, parent = _receive(tasks)
        settings = EncodeSettings(*values)
        with suppress(OSError, AttributeError):  # Linux: a worker that hangs does not outlive a parent that is killed
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            return
        warnings.simplefilter("ignore")
        answers = _Answers(tasks_descriptor, news_descriptor, shared_descriptor)
        message = _receive(tasks)
        if not jpeg.available() or not all(name.lower().endswith(_JPEG_SUFFIXES) for name, *_ in message[1]):
            from sdpnet.pipelines.images import file as image_file  # noqa: F401 - while the time does not count yet
        gc.freeze()
        answers.say(0)
        while True:
            freed, locations = message
            answers.begin()
            for location in locations:
                answers.add(encode_one(Location(*location), settings), freed)
            answers.tell()
            message = _receive(tasks)
