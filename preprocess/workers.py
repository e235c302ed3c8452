"""Encodes images in worker processes, in order, and says which image it was when one of them dies or hangs.

    Location of each image -> [worker: read, encode, CRC-32] x num_workers -> Encoded | Bad, in the order asked for

A worker is a process of its own because decoders are C code that may crash, hang or take all memory on a hostile file.
Its images come back through memory that both processes share; what does not fit there comes through the socket that
also carries locations and answers.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from pipelines.errors import UserError
from preprocess.encode import EncodeSettings
from preprocess.location import Location
from preprocess.worker import ANSWER, BAD, INLINE, SHARED_BYTES, Bad, Encoded, encode_one

__all__ = ["HANG_SECONDS", "Bad", "Encoded", "encode_all", "encode_one"]

HANG_SECONDS: Final = 8.0
_ROOT: Final = Path(__file__).resolve().parent.parent
_TASKS: Final = 8  # images that a worker has in hand
_BUFFERED_BYTES: Final = 1 << 28  # finished images that wait for an earlier one
_LOOK_SECONDS: Final = 0.25  # between two looks at what a silent worker does
# What a decoder's own mistakes end a process with. Other signals come from outside: the system short of memory, a user.
_CRASHES: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


def encode_all(
    locate: Callable[[int], Location],
    first: int,
    last: int,
    settings: EncodeSettings,
    num_workers: int,
    hang_seconds: float = HANG_SECONDS,
) -> Generator[Encoded | Bad, None, None]:
    """Encodes the images `first` to `last - 1` and yields them in this order; their `data` holds until the next one.

    At most `_TASKS` images a worker are in hand and about 256 MB wait for an earlier image, whatever the consumer does.
    Close the generator to stop early: no process outlives it.

    Args:
        locate: gives image i's place.
        first, last: which images.
        settings: how to store them.
        num_workers: processes; 0 encodes in this one, which then dies or hangs with its decoder.
        hang_seconds: an image that takes longer, not counting time in which its process waits for a disk, is `Bad`, as
            is one that crashes its process.

    Raises:
        UserError: naming the image that a worker had in hand when it was killed from outside.
    """
    if num_workers == 0:
        for index in range(first, last):
            yield encode_one(locate(index), settings)
        return
    pool = _Pool(locate, settings, min(num_workers, max(last - first, 1)), hang_seconds)
    try:
        yield from pool.run(first, last)
    finally:
        pool.close()


class _Worker:
    """A process, the images that it has in hand (the first is the one that it is at), and how long it is silent:
    `silent` seconds that count, and `waited` seconds of which that is not known yet."""

    def __init__(self, settings: EncodeSettings) -> None:
        ours, theirs = socket.socketpair()
        shared = _shared_memory()
        self.shared = memoryview(mmap.mmap(shared, SHARED_BYTES))
        descriptors = [theirs.fileno(), shared]
        path = [*(entry or os.getcwd() for entry in sys.path), str(_ROOT)]
        code = f"import sys; sys.path[:] = {path!r}; from preprocess.worker import work; work(*{descriptors})"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", code],  # the path is all that site would do
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
            )
        finally:
            theirs.close()
            os.close(shared)
        self.connection = Connection(ours.detach())
        with suppress(BrokenPipeError, ConnectionResetError):  # that it has died is noticed on reading
            self.connection.send((settings, os.getpid()))
        self.tasks: deque[int] = deque()
        self.ready = False
        self.silent = self.waited = 0.0
        self.slots: deque[_Slot] = deque()  # of the images in the shared memory, in its order
        self.freed = 0

    def give(self, tasks: list[tuple[int, Location]]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send((self.freed, [location for _, location in tasks]))
        self.tasks.extend(index for index, _ in tasks)

    def receive(self) -> tuple[Encoded | Bad, _Slot]:
        """Its next answer. Raises EOFError or OSError when it has died."""
        message = self.connection.recv_bytes()
        kind, kept, height, width, size, crc32, end = ANSWER.unpack_from(message)
        slot = _Slot(self, end)
        self.slots.append(slot)
        if kind == BAD:
            return Bad(message[ANSWER.size :].decode()), slot
        if kind == INLINE:
            return Encoded(message[ANSWER.size :], height, width, kept, crc32), slot
        start = (end - size) % SHARED_BYTES
        return Encoded(self.shared[start : start + size], height, width, kept, crc32), slot

    def waits_for_disk(self) -> bool:
        try:
            with open(f"/proc/{self.process.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] == b"D"
        except (OSError, IndexError):
            return False

    def end(self) -> int:
        """Its exit status; it is killed if it still runs."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()


def _shared_memory() -> int:
    """A descriptor of `SHARED_BYTES` that lie in memory where the system can, and in no directory."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("images")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, SHARED_BYTES)
    return descriptor


class _Slot:
    """Shared memory up to `end`, counted from the start of all that was ever written there, until it is given back."""

    def __init__(self, worker: _Worker, end: int) -> None:
        self.worker, self.end, self.free = worker, end, False

    def give_back(self) -> None:
        self.free = True
        slots = self.worker.slots
        while slots and slots[0].free:
            self.worker.freed = slots.popleft().end


class _Pool:
    def __init__(
        self, locate: Callable[[int], Location], settings: EncodeSettings, num_workers: int, hang_seconds: float
    ) -> None:
        self.locate = locate
        self.settings = settings
        self.hang_seconds = hang_seconds
        self.workers: dict[int, _Worker] = {}
        self.poll = select.poll()
        self.done: dict[int, tuple[Encoded | Bad, _Slot | None]] = {}
        self.buffered = 0
        self.num_workers = num_workers
        self.unassigned: deque[int] = deque()  # what a worker that died had not begun
        self.next_task = 0

    def run(self, first: int, last: int) -> Generator[Encoded | Bad, None, None]:
        self.next_task = first
        while len(self.workers) < self.num_workers:
            self._start()
        for index in range(first, last):
            while index not in self.done:
                self._assign(index, last)
                self._receive()
            result, slot = self.done.pop(index)
            self.buffered -= len(result.data) if isinstance(result, Encoded) else 0
            yield result
            if slot is not None:
                slot.give_back()

    def close(self) -> None:
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()

    def _start(self) -> None:
        worker = _Worker(self.settings)
        self.workers[worker.connection.fileno()] = worker
        self.poll.register(worker.connection.fileno(), select.POLLIN)

    def _assign(self, wanted: int, last: int) -> None:
        """Fills the workers' hands. What is wanted next is always among it; the rest only while the buffer has room."""
        ahead = wanted + 4 * _TASKS * len(self.workers)
        for worker in sorted(self.workers.values(), key=lambda worker: len(worker.tasks)):
            tasks: list[tuple[int, Location]] = []
            while len(worker.tasks) <= _TASKS // 2 and len(worker.tasks) + len(tasks) < _TASKS:
                index = self.unassigned[0] if self.unassigned else self.next_task
                full = self.buffered > _BUFFERED_BYTES or index >= ahead
                if index >= last or (full and index != wanted):
                    break
                if self.unassigned:
                    self.unassigned.popleft()
                else:
                    self.next_task += 1
                tasks.append((index, self.locate(index)))
            if tasks:
                worker.give(tasks)

    def _receive(self) -> None:
        """Takes what the workers have to say; those that are silent for too long, or have died, are replaced."""
        began = time.monotonic()
        events = self.poll.poll(500)
        # Only the time that we waited counts, and no leap of it: this process, or the machine, may have been stopped.
        waited = min(time.monotonic() - began, 1.0)
        speaking = set()
        for descriptor, _ in events:
            speaking.add(descriptor)
            worker = self.workers[descriptor]
            worker.silent = worker.waited = 0.0
            try:
                if not worker.ready:
                    worker.connection.recv_bytes()
                    worker.ready = True
                    continue
                result, slot = worker.receive()
            except (EOFError, OSError):
                self._replace(worker, None)
                continue
            self.done[worker.tasks.popleft()] = result, slot
            self.buffered += len(result.data) if isinstance(result, Encoded) else 0
        if len(speaking) == len(self.workers):
            return
        for descriptor, worker in list(self.workers.items()):
            if descriptor in speaking or not worker.ready or not worker.tasks:
                continue
            worker.waited += waited
            if worker.waited < _LOOK_SECONDS:
                continue
            worker.silent += 0.0 if worker.waits_for_disk() else worker.waited
            worker.waited = 0.0
            if worker.silent > self.hang_seconds:
                self._replace(worker, f"the decoder hangs (more than {self.hang_seconds:g} s); replace or remove it")

    def _replace(self, worker: _Worker, reason: str | None) -> None:
        descriptor = worker.connection.fileno()
        self.poll.unregister(descriptor)
        del self.workers[descriptor]
        if reason is None:  # it has closed the connection, and has ended or is about to
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(5)
        status = worker.end()
        if reason is None:
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            if not worker.ready:
                raise UserError(f"a worker process cannot start ({name}); what it printed stands above")
            at = f"{self.locate(worker.tasks[0]).name}: " if worker.tasks else ""
            if status >= 0 or -status not in _CRASHES or not worker.tasks:
                raise UserError(
                    f"{at}its worker process was ended by {name}{' (out of memory?)' if status == -9 else ''}; "
                    "the same command goes on from here"
                )
            reason = f"the decoder crashes ({name}); replace or remove it"
        self.done[worker.tasks.popleft()] = Bad(reason), None
        self.unassigned.extend(worker.tasks)
        self.unassigned = deque(sorted(self.unassigned))
        self._start()
