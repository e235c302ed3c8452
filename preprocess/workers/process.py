"""The parent's view of a worker process: the images that are assigned to it, and those that it has finished."""

from __future__ import annotations

import marshal
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any, Final

import sdpnet
from sdpnet.preprocess.encoding.encode import EncodeSettings
from sdpnet.preprocess.sources.parquet.row import ImageLocation
from sdpnet.preprocess.workers.child import (
    ANSWER,
    ANSWERS_START,
    COUNT,
    IMAGES_START,
    MESSAGE,
    NUM_ANSWERS,
    SHARED_BYTES,
)
from sdpnet.preprocess.workers.result import Bad, Encoded, ImageState

__all__ = ["ASLEEP", "Slot", "WorkerProcess"]

# The state of a process that sleeps. Other states are "R" (running or ready to run), "D" (waiting for a disk), "T" and
# "t" (stopped).
ASLEEP: Final = "S"
_ROOT: Final = Path(sdpnet.__file__).resolve().parent.parent


class Slot:
    """The memory of an image in the ring buffer of a worker.

    It has `size` bytes and ends at the position `end`, which is counted since the start, without wrapping around. Slots
    may be released in any order; the worker can reuse the memory up to the first slot that is not released.
    """

    __slots__ = ("_free", "_process", "end", "size")

    def __init__(self, process: WorkerProcess, end: int, size: int) -> None:
        self._process, self.end, self.size, self._free = process, end, size, False

    def release(self) -> None:
        """Releases the memory of the image, which the worker may then reuse."""
        self._free = True
        slots = self._process.slots
        while slots and slots[0]._free:
            self._process.freed = slots.popleft().end


class WorkerProcess:
    """A process that runs `sdpnet.preprocess.workers.child.work`.

    Attributes:
        tasks: the indices of the images that are assigned to it, in order; the first is its current image.
        ready: whether it has finished its start-up.
        num_notified: the number of finished images of which it has sent a notice.
        slots: the slots of the images in the shared memory, in order.
        freed: the position up to which the ring buffer is released.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        self._socket, child_socket = socket.socketpair()
        notices, child_notices = os.pipe()
        self._notices = open(notices, "rb", 0)  # noqa: SIM115 - closed by `close`
        shared = _shared_memory(IMAGES_START + SHARED_BYTES)
        self._shared = memoryview(mmap.mmap(shared, IMAGES_START + SHARED_BYTES))
        descriptors = [child_socket.fileno(), child_notices, shared]
        path = [*(entry or os.getcwd() for entry in sys.path), str(_ROOT)]
        start = "from sdpnet.preprocess.workers.child import work"
        code = f"import sys; sys.path[:] = {path!r}; {start}; work(*{descriptors})"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", code],  # without `site`, whose only effect here would be the path
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
            )
        finally:
            child_socket.close()
            os.close(child_notices)
            os.close(shared)
        self.tasks: deque[int] = deque()
        self.ready = False
        self.num_notified = self._num_taken = 0
        self.slots: deque[Slot] = deque()
        self.freed = 0
        self._send((astuple(settings), os.getpid()))

    def fileno(self) -> int:
        """The descriptor of the notices, for `select.poll`."""
        return self._notices.fileno()

    def assign(self, tasks: list[tuple[int, ImageLocation]]) -> None:
        """Assigns images, given by their indices and locations."""
        self._send((self.freed, [tuple(location) for _, location in tasks]))
        self.tasks.extend(index for index, _ in tasks)

    def read_notices(self) -> None:
        """Reads the notices of finished images. Raises EOFError if the process has died."""
        notices = self._notices.read(4096)
        if not notices:
            raise EOFError
        self.ready = True
        self.num_notified += sum(notices)

    def finished(self) -> int:
        """The number of images that it has finished.

        While it runs, images without a notice may not be readable yet: this processor may see the new count before the
        answers and the images.
        """
        return int(COUNT.unpack_from(self._shared)[0])

    def take(self, count: int) -> Iterator[tuple[int, Encoded | Bad, Slot]]:
        """Takes finished images, from the first one that is not taken yet up to the `count`-th since the start.

        Raises EOFError or OSError if the process has died while it sent an image.
        """
        while self._num_taken < count:
            place = ANSWERS_START + self._num_taken % NUM_ANSWERS * ANSWER.size
            state, inline, height, width, size, crc32, end = ANSWER.unpack_from(self._shared, place)
            start = IMAGES_START + (end - size) % SHARED_BYTES
            data = self._receive(size) if inline else self._shared[start : start + size]
            slot = Slot(self, end, size)
            self.slots.append(slot)
            self._num_taken += 1
            if state == ImageState.BAD:
                yield self.tasks.popleft(), Bad(bytes(data).decode(errors="surrogateescape")), slot
            else:
                yield self.tasks.popleft(), Encoded(data, height, width, state == ImageState.KEPT, crc32), slot

    def activity(self) -> tuple[str, float]:
        """The state of the process in Linux's /proc, and the processor time of all its threads in seconds.

        The result is `ASLEEP` and 0 on systems without this information.
        """
        try:
            with open(f"/proc/{self._process.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            return fields[0].decode(), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return ASLEEP, 0.0

    def end(self, timeout: float = 0.0) -> int:
        """Waits for the end of the process, kills it after `timeout` seconds, and returns its exit status."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        self._process.kill()
        return self._process.wait()

    def close(self) -> None:
        """Kills the process and closes the descriptors."""
        self.end()
        self._socket.close()
        self._notices.close()

    def _send(self, message: tuple[Any, Any]) -> None:
        content = marshal.dumps(message)
        with suppress(BrokenPipeError, ConnectionResetError):  # a process that has died is noticed on reading
            self._socket.sendall(MESSAGE.pack(len(content)) + content)

    def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            received = self._socket.recv_into(view)
            if received == 0:
                raise EOFError
            view = view[received:]
        return bytes(data)


def _shared_memory(size: int) -> int:
    """A descriptor of shared memory without a name, which disappears with the last process that uses it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("images")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
