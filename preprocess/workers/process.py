"""A worker process as its parent sees it: the images that it has in hand, and those that it has finished."""

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
from sdpnet.preprocess.sources.files.location import Location
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

ASLEEP: Final = "S"  # of a process's states; others are "R" (runs, or would if a processor were free), "D" (waits for a
# disk), "T" and "t" (stopped)
_ROOT: Final = Path(sdpnet.__file__).resolve().parent.parent


class Slot:
    """An image's place in the shared memory: `size` bytes up to `end`, counted from the start of all that was ever
    written there, until it is given back."""

    __slots__ = ("_free", "_process", "end", "size")

    def __init__(self, process: WorkerProcess, end: int, size: int) -> None:
        self._process, self.end, self.size, self._free = process, end, size, False

    def give_back(self) -> None:
        self._free = True
        slots = self._process.slots
        while slots and slots[0]._free:
            self._process.freed = slots.popleft().end


class WorkerProcess:
    """A process that runs `sdpnet.preprocess.workers.child.work`.

    Attributes:
        tasks: the images that it has in hand, in its order; the first is the one that it is at.
        ready: whether it has begun.
        told: how many images it has said are finished.
        slots: of the images in the shared memory, in its order.
        freed: up to where the shared memory was given back.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        self._socket, theirs = socket.socketpair()
        news, their_news = os.pipe()
        self._news = open(news, "rb", 0)  # noqa: SIM115 - closed by `end`
        shared = _shared_memory(IMAGES_START + SHARED_BYTES)
        self._shared = memoryview(mmap.mmap(shared, IMAGES_START + SHARED_BYTES))
        descriptors = [theirs.fileno(), their_news, shared]
        path = [*(entry or os.getcwd() for entry in sys.path), str(_ROOT)]
        start = "from sdpnet.preprocess.workers.child import work"
        code = f"import sys; sys.path[:] = {path!r}; {start}; work(*{descriptors})"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", code],  # the path is all that site would do
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
            )
        finally:
            theirs.close()
            os.close(their_news)
            os.close(shared)
        self.tasks: deque[int] = deque()
        self.ready = False
        self.told = self._taken = 0
        self.slots: deque[Slot] = deque()
        self.freed = 0
        self._send((astuple(settings), os.getpid()))

    def fileno(self) -> int:
        """Can be read when there are news."""
        return self._news.fileno()

    def give(self, tasks: list[tuple[int, Location]]) -> None:
        """Puts images into its hands."""
        self._send((self.freed, [tuple(location) for _, location in tasks]))
        self.tasks.extend(index for index, _ in tasks)

    def hear(self) -> None:
        """Reads the news. Raises EOFError when it has died."""
        news = self._news.read(4096)
        if not news:
            raise EOFError
        self.ready = True
        self.told += sum(news)

    def finished(self) -> int:
        """How many images it has finished. While it runs, those that it has not told of may not all be there yet:
        another processor may see the count before the rest."""
        return int(COUNT.unpack_from(self._shared)[0])

    def take(self, count: int) -> Iterator[tuple[int, Encoded | Bad, Slot]]:
        """The images that it has finished, from the first one not taken yet to the `count`th since its start, which
        leave its hands. Raises EOFError or OSError when it has died in the middle of one."""
        while self._taken < count:
            place = ANSWERS_START + self._taken % NUM_ANSWERS * ANSWER.size
            state, inline, height, width, size, crc32, end = ANSWER.unpack_from(self._shared, place)
            start = IMAGES_START + (end - size) % SHARED_BYTES
            data = self._receive(size) if inline else self._shared[start : start + size]
            slot = Slot(self, end, size)
            self.slots.append(slot)
            self._taken += 1
            if state == ImageState.BAD:
                yield self.tasks.popleft(), Bad(bytes(data).decode(errors="surrogateescape")), slot
            else:
                yield self.tasks.popleft(), Encoded(data, height, width, state == ImageState.KEPT, crc32), slot

    def activity(self) -> tuple[str, float]:
        """What it does: `ASLEEP`, or another state of Linux's /proc; and the processor time of all its threads, in
        seconds. `ASLEEP` and 0 where the system does not say it."""
        try:
            with open(f"/proc/{self._process.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            return fields[0].decode(), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return ASLEEP, 0.0

    def end(self, patience: float = 0.0) -> int:
        """Its exit status; it is killed if it still runs after so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        return self._process.wait()

    def close(self) -> None:
        """Ends it for good."""
        self.end()
        self._socket.close()
        self._news.close()

    def _send(self, message: tuple[Any, Any]) -> None:
        content = marshal.dumps(message)
        with suppress(BrokenPipeError, ConnectionResetError):  # that it has died is noticed on reading
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
    """A descriptor of memory that lies where the system can have it, and in no directory."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("images")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
