"""A worker process: takes locations of images and answers with images, until the other side has gone.

It imports as little as it can: starting takes as long as converting some hundred images.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import signal
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pipelines.errors import UserError
from preprocess import jpeg
from preprocess.encode import EncodeSettings, encode_image
from preprocess.location import Location

__all__ = ["ANSWER", "BAD", "INLINE", "SHARED", "SHARED_BYTES", "Bad", "Encoded", "encode_one", "work"]

SHARED_BYTES: Final = 1 << 24  # of each worker
_JPEG_SUFFIXES: Final = (".jpeg", ".jpg")
_MESSAGE: Final = struct.Struct("!i")  # multiprocessing.connection's header: the message's size

# A worker's answer: kind, kept, height, width, size, CRC-32, and where its shared memory is used up to, counted on
# through all rounds; behind it the image, if it is inline, or the reason.
ANSWER: Final = struct.Struct("<B?HHIIQ")
SHARED, INLINE, BAD = range(3)


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored: a JPEG file's bytes, its size in pixels, whether its coefficients are the original's
    (`kept`), and the CRC-32 of the bytes."""

    data: bytes | memoryview
    height: int
    width: int
    kept: bool
    crc32: int


@dataclass(frozen=True)
class Bad:
    """An image that cannot be stored, and why: part of a sentence, without the image's name."""

    reason: str


def encode_one(location: Location, settings: EncodeSettings) -> Encoded | Bad:
    """Reads and encodes one image; whatever goes wrong is the image's reason."""
    try:
        image = encode_image(location.read(), settings, location.name)
    except UserError as error:
        return Bad(str(error).removeprefix(f"{location.name}: "))
    except Exception as error:  # a mistake of ours or of a library must not cost the other images
        return Bad(f"cannot be converted ({type(error).__name__}: {' '.join(str(error).split())})")
    return Encoded(image.data, image.height, image.width, image.kept, jpeg.crc32(image.data))


class _Connection:
    """The other end of a `multiprocessing.connection.Connection`, whose module takes 20 ms to import."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def receive(self) -> Any:
        """Raises EOFError when the other side has gone."""
        (size,) = _MESSAGE.unpack(self._read(_MESSAGE.size))
        return pickle.loads(self._read(size))

    def send(self, message: bytes) -> None:
        view = memoryview(_MESSAGE.pack(len(message)) + message)
        while view:
            view = view[os.write(self.descriptor, view) :]

    def _read(self, size: int) -> bytes:
        content = os.read(self.descriptor, size)
        while len(content) < size:
            more = os.read(self.descriptor, size - len(content))
            if not more:
                raise EOFError
            content += more
        return content


def work(descriptor: int, shared_descriptor: int) -> None:
    """Runs in a process of its own; the numbers of its socket and of the shared memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = _Connection(descriptor)
    settings, parent = connection.receive()
    with suppress(OSError, AttributeError):  # Linux: a worker that hangs does not outlive a parent that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        return
    warnings.simplefilter("ignore")
    shared = memoryview(mmap.mmap(shared_descriptor, SHARED_BYTES))
    used = 0
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        message = connection.receive()
        if not jpeg.available() or not all(place.name.lower().endswith(_JPEG_SUFFIXES) for place in message[1]):
            from preprocess import pillow  # noqa: F401 - while the time does not count yet
        gc.freeze()
        connection.send(b"ready")
        while True:
            freed, locations = message
            for location in locations:
                result = encode_one(location, settings)
                if isinstance(result, Bad):
                    connection.send(ANSWER.pack(BAD, False, 0, 0, 0, 0, used) + result.reason.encode())
                    continue
                size = len(result.data)
                start = used
                if used % SHARED_BYTES + size > SHARED_BYTES:  # to the next round's start: an image lies in one piece
                    start = -(-used // SHARED_BYTES) * SHARED_BYTES
                fits = start + size - freed <= SHARED_BYTES
                if fits:
                    used = start + size
                    shared[start % SHARED_BYTES : start % SHARED_BYTES + size] = result.data
                facts = (result.kept, result.height, result.width, size, result.crc32, used)
                connection.send(ANSWER.pack(SHARED, *facts) if fits else ANSWER.pack(INLINE, *facts) + result.data)
            message = connection.receive()
