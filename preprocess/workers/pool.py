"""Encodes images in worker processes, in order, and says which image it was when one of them dies or hangs.

    Location of each image -> [worker: read, encode, CRC-32] x num_workers -> Encoded | Bad, in the order asked for

A worker is a process of its own because decoders are C code that may crash, hang or take all memory on a hostile file.
Its images come back through memory that both processes share (`sdpnet.preprocess.workers.child`).
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Final

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.encoding.encode import EncodeSettings
from sdpnet.preprocess.sources.files.location import Location
from sdpnet.preprocess.workers.child import encode_one
from sdpnet.preprocess.workers.process import ASLEEP, Slot, WorkerProcess
from sdpnet.preprocess.workers.result import Bad, Encoded

__all__ = ["ASLEEP_SECONDS", "HANG_SECONDS", "Workers", "encode_all"]

HANG_SECONDS: Final = 8.0  # of processor time, and so many more for each MB of the file:
_SECONDS_PER_MB: Final = 1.0  # six times what OpenJPEG takes, the slowest decoder (0.16 s)
ASLEEP_SECONDS: Final = 600.0  # in which a worker uses no processor, nor waits for a disk, nor is stopped
_TASKS: Final = 8  # images that a worker has in hand
_BUFFERED_BYTES: Final = 1 << 28  # finished images that wait for an earlier one
_LOOK_SECONDS: Final = 0.02  # between two looks at what workers have finished that do not tell of it
_ACTIVITY_SECONDS: Final = 0.25  # between two looks at what a silent worker does
# What a decoder's own mistakes end a process with. Other signals come from outside: the system short of memory, a user.
_CRASHES: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


def encode_all(
    locate: Callable[[int], Location],
    first: int,
    last: int,
    settings: EncodeSettings,
    num_workers: int,
    hang_seconds: float = HANG_SECONDS,
    asleep_seconds: float | None = None,
) -> Generator[Encoded | Bad, None, None]:
    """Encodes images with workers of its own; see `Workers`. Close the generator to stop early."""
    with Workers(settings, min(num_workers, max(last - first, 1)), hang_seconds, asleep_seconds) as workers:
        yield from workers.encode(locate, first, last)


class _Worker(WorkerProcess):
    """What looks have seen of a process.

    Attributes:
        seen: how many images it had finished at the last look.
        waited: seconds since then, or since the last look at its activity.
        first_cpu_seconds: its processor time at the first look at its activity since then; None: there was none.
        last_cpu_seconds: the same at the last one.
        asleep: for how many seconds it has slept since.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        super().__init__(settings)
        self.begin_watch(0)

    def begin_watch(self, finished: int) -> None:
        """It has finished so many images, and is at another one."""
        self.seen = finished
        self.first_cpu_seconds: float | None = None
        self.last_cpu_seconds = self.asleep = self.waited = 0.0


class Workers:
    """Processes that encode images. They start at once, and encode one stretch of images after another.

        with Workers(settings, num_workers) as workers:
            for result in workers.encode(locate, first, last):
                ...

    Args:
        settings: how to store images.
        num_workers: processes; 0 encodes in this one, which then dies or hangs with its decoder.
        hang_seconds: an image that takes more processor time is `Bad`, as is one that crashes its process; each MB of
            its file allows it a second more. What other processes do to the machine makes no difference to it, nor does
            a process that is stopped or waits.
        asleep_seconds: nor does one that sleeps, up to so many seconds.
    """

    def __init__(
        self,
        settings: EncodeSettings,
        num_workers: int,
        hang_seconds: float = HANG_SECONDS,
        asleep_seconds: float | None = None,
    ) -> None:
        self._settings, self._num_workers, self._hang_seconds = settings, num_workers, hang_seconds
        self._asleep_seconds = max(hang_seconds, ASLEEP_SECONDS) if asleep_seconds is None else asleep_seconds
        self._workers: dict[int, _Worker] = {}
        self._poll = select.poll()
        self._waited = 0.0  # since the last look
        self._done: dict[int, tuple[Encoded | Bad, Slot | None]] = {}
        self._buffered = 0
        self._failure: UserError | None = None  # to be raised behind what was finished before
        self._unassigned: deque[int] = deque()  # what a worker that died had not begun
        self._next_task = 0
        for _ in range(num_workers):
            self._start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def encode(self, locate: Callable[[int], Location], first: int, last: int) -> Generator[Encoded | Bad, None, None]:
        """Encodes the images `first` to `last - 1` and yields them in order; their `data` holds until the next one.

        At most `_TASKS` images a worker are in hand and about 256 MB wait for an earlier image, whatever the consumer
        does. Closing the generator early ends the processes for good.

        Args:
            locate: gives image i's place.
            first, last: which images.

        Raises:
            UserError: naming the image that a worker had in hand when it was killed from outside.
        """
        if self._num_workers == 0:
            for index in range(first, last):
                yield encode_one(locate(index), self._settings)
            return
        assert self._workers, "closed"
        self._locate, self._next_task = locate, first
        try:
            for index in range(first, last):
                while index not in self._done:
                    if self._failure is not None:
                        raise self._failure
                    self._assign(index, last)
                    self._receive()
                result, slot = self._done.pop(index)
                if slot is None:
                    yield result
                    continue
                self._buffered -= slot.size
                yield result
                slot.give_back()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        worker = _Worker(self._settings)
        self._workers[worker.fileno()] = worker
        self._poll.register(worker.fileno(), select.POLLIN)

    def _assign(self, wanted: int, last: int) -> None:
        """Fills the workers' hands. What is wanted next is always among it; the rest only while the buffer has room."""
        ahead = wanted + 4 * _TASKS * len(self._workers)
        free = [worker for worker in self._workers.values() if len(worker.tasks) <= _TASKS // 2]
        for worker in sorted(free, key=lambda worker: len(worker.tasks)):
            tasks: list[tuple[int, Location]] = []
            while len(worker.tasks) + len(tasks) < _TASKS:
                index = self._unassigned[0] if self._unassigned else self._next_task
                full = self._buffered > _BUFFERED_BYTES or index >= ahead
                if index >= last or (full and index != wanted):
                    break
                if self._unassigned:
                    self._unassigned.popleft()
                else:
                    self._next_task += 1
                tasks.append((index, self._locate(index)))
            if tasks:
                worker.give(tasks)

    def _receive(self) -> None:
        """Takes what the workers have finished; those that are silent for too long, or have died, are replaced."""
        began = time.monotonic()
        events = self._poll.poll(1000 * _LOOK_SECONDS)
        # Only the time that we waited counts, and no leap of it: this process, or the machine, may have been stopped.
        self._waited += min(time.monotonic() - began, 5 * _LOOK_SECONDS)
        for descriptor, _ in events:
            worker = self._workers[descriptor]
            try:
                worker.hear()
                self._take(worker, worker.told)
            except (EOFError, OSError):
                self._replace(worker, None)
        if self._waited >= _LOOK_SECONDS:
            waited, self._waited = self._waited, 0.0
            for worker in list(self._workers.values()):
                self._look(worker, waited)

    def _take(self, worker: _Worker, count: int) -> None:
        for index, result, slot in worker.take(count):
            self._done[index] = result, slot
            self._buffered += slot.size

    def _look(self, worker: _Worker, waited: float) -> None:
        """Takes what a worker had finished at the last look, if it is at a slow image since, and watches that one."""
        with suppress(EOFError, OSError):  # that it has died is noticed on reading its news
            self._take(worker, worker.seen)
        finished = worker.finished()
        if finished != worker.seen or not worker.ready or not worker.tasks:
            worker.begin_watch(finished)
            return
        worker.waited += waited
        if worker.waited < _ACTIVITY_SECONDS:
            return
        waited, worker.waited = worker.waited, 0.0
        state, cpu_seconds = worker.activity()
        if worker.finished() != worker.seen:  # what it has used may be of the next image
            return
        if worker.first_cpu_seconds is None:
            worker.first_cpu_seconds = worker.last_cpu_seconds = cpu_seconds
        if state == ASLEEP and cpu_seconds == worker.last_cpu_seconds:
            worker.asleep += waited
        worker.last_cpu_seconds = cpu_seconds
        used = cpu_seconds - worker.first_cpu_seconds
        if used > self._hang_seconds and used > (limit := self._hang_seconds + self._megabytes(worker.tasks[0])):
            what = f"the decoder hangs (more than {round(limit, 1):g} s of processor time)"
            self._replace(worker, f"{what}; replace or remove it, or raise --hang-seconds")
        elif worker.asleep > self._asleep_seconds:
            self._replace(worker, f"the decoder hangs (asleep for {self._asleep_seconds:g} s); replace or remove it")

    def _megabytes(self, index: int) -> int:
        """Whole ones of an image's file."""
        location = self._locate(index)
        try:
            size = os.path.getsize(location.path) if location.size is None else location.size
        except OSError:  # it is gone, but the worker may have it still
            size = 0
        return int(_SECONDS_PER_MB * size) // 1_000_000

    def _replace(self, worker: _Worker, reason: str | None) -> None:
        self._poll.unregister(worker.fileno())
        del self._workers[worker.fileno()]
        if reason is None:
            status = worker.end(patience=5)  # it has closed its end of the pipe, and has ended or is about to
            with suppress(EOFError, OSError):  # an image that did not come through whole is the one that it was at
                self._take(worker, worker.finished())
        worker.close()
        if reason is None:
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            if not worker.ready:
                raise UserError(f"a worker process cannot start ({name}); what it printed stands above")
            at = f"{self._locate(worker.tasks[0]).name}: " if worker.tasks else ""
            if status >= 0 or -status not in _CRASHES or not worker.tasks:
                self._failure = UserError(
                    f"{at}its worker process was ended by {name}{' (out of memory?)' if status == -9 else ''}; "
                    "the same command goes on from here"
                )
                return
            reason = f"the decoder crashes ({name}); replace or remove it"
        self._done[worker.tasks.popleft()] = Bad(reason), None
        self._unassigned.extend(worker.tasks)
        self._unassigned = deque(sorted(self._unassigned))
        self._start()
