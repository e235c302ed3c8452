"""Encodes images in worker processes, in order. If a worker crashes or hangs, its image is identified.

    Location of each image -> [worker: read, encode, CRC-32] x num_workers -> Encoded | Bad, in the order of the indices

Workers are processes because decoders are C code that may crash, hang or take all memory on a hostile file. Images come
back through shared memory (`sdpnet.preprocess.workers.child`).
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
from sdpnet.pipelines.machine import MAX_WORKERS, core_share
from sdpnet.preprocess.encoding.settings import HANG_SECONDS, EncodeSettings
from sdpnet.preprocess.sources.parquet.row import ImageLocation, RowLocation
from sdpnet.preprocess.workers.child import encode_one
from sdpnet.preprocess.workers.process import ASLEEP, Slot, WorkerProcess
from sdpnet.preprocess.workers.result import Bad, Encoded

__all__ = ["ASLEEP_SECONDS", "HANG_SECONDS", "Workers", "encode_all", "number_of_workers"]


# The time limit of an image counts the processor time of its worker, not the time on the clock. With a limit of 10 s on
# the clock, good images of 40 megapixels were bad at a load of 9, and the bytes of a conversion depended on the load.
_SECONDS_PER_MB: Final = 1.0  # added for each MB of the file: six times the time of OpenJPEG, the slowest decoder
ASLEEP_SECONDS: Final = 600.0  # the limit for a worker that sleeps: it neither runs, waits for a disk, nor is stopped
_TASKS: Final = 8  # the number of images that are assigned to a worker at a time
# The same for rows of Parquet files. Each worker decodes a whole row group (usually 100 images) for the rows that it is
# assigned: for 8 of every 128 rows, as with 16 workers, that takes 0.7 ms an image, and for all rows 0.1 ms.
_ROW_TASKS: Final = 32
_BUFFERED_BYTES: Final = 1 << 28  # the size of finished images that may wait for an earlier one
_CHECK_SECONDS: Final = 0.02  # the interval of the checks for finished images without a notice
_ACTIVITY_SECONDS: Final = 0.25  # the interval of the checks of a worker's activity
# The signals by which an error of a decoder ends its process. All other signals come from outside, for example from a
# system that is short of memory, or from a user. They say nothing about the image, which is therefore not bad.
_CRASHES: Final = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


def number_of_workers(given: int | None) -> int:
    """The number of worker processes of a command: that of `--workers`, or by default one for each core.

    Raises `UserError` for a number that is not from 1 to `MAX_WORKERS`.
    """
    if given is None:
        return core_share()
    if not 1 <= given <= MAX_WORKERS:
        raise UserError(f"--workers {given}: must be 1 to {MAX_WORKERS}")
    return given


def encode_all(
    locate: Callable[[int], ImageLocation],
    first: int,
    last: int,
    settings: EncodeSettings,
    num_workers: int,
    hang_seconds: float = HANG_SECONDS,
    asleep_seconds: float | None = None,
) -> Generator[Encoded | Bad, None, None]:
    """Encodes images with new workers; see `Workers`. Close the generator to stop early."""
    with Workers(settings, min(num_workers, max(last - first, 1)), hang_seconds, asleep_seconds) as workers:
        yield from workers.encode(locate, first, last)


class _Worker(WorkerProcess):
    """A worker process, and the observations of its current image.

    Attributes:
        num_seen: the number of images that it had finished at the last check.
        waited: the seconds since the last check of its activity, or since it began its current image.
        first_cpu_seconds: its processor time at the first check of its activity during the current image; None before.
        last_cpu_seconds: its processor time at the last check of its activity.
        asleep: the seconds for which it has slept during the current image.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        super().__init__(settings)
        self.begin_watch(0)

    def begin_watch(self, num_finished: int) -> None:
        """Resets the observations for a new image. `num_finished` is the number of images that it has finished."""
        self.num_seen = num_finished
        self.first_cpu_seconds: float | None = None
        self.last_cpu_seconds = self.asleep = self.waited = 0.0


class Workers:
    """Processes that encode images. They are started immediately and can encode several ranges of images in turn.

        with Workers(settings, num_workers) as workers:
            for result in workers.encode(locate, first, last):
                ...

    Args:
        settings: how to store images.
        num_workers: the number of processes. 0 encodes in this process, which then crashes or hangs with the decoder.
        hang_seconds: an image that takes more processor time is `Bad`, like one that crashes its process. The limit is
            a second higher for each MB of its file. The load of the machine does not matter, nor the time in which
            the process is stopped or waits for a disk.
        asleep_seconds: an image at which the process sleeps for longer than this is `Bad`, too. The default is
            `ASLEEP_SECONDS`, or `hang_seconds` if that is more.
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
        self._waited = 0.0  # seconds since the last check
        self._done: dict[int, tuple[Encoded | Bad, Slot | None]] = {}
        self._buffered = 0
        self._failure: UserError | None = None  # raised after the images that were finished before it
        self._unassigned: deque[int] = deque()  # the images that a worker had not begun when it died
        self._next_task, self._num_tasks = 0, _TASKS
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

    def encode(
        self, locate: Callable[[int], ImageLocation], first: int, last: int
    ) -> Generator[Encoded | Bad, None, None]:
        """Encodes the images `first` to `last - 1` and yields them in order. `data` is valid until the next image.

        At most `_TASKS` images (`_ROW_TASKS` rows) are assigned to each worker, and about 256 MB of images wait for an
        earlier one, even if the consumer is slow. Closing the generator early ends the processes.

        Args:
            locate: returns the location of image i.
            first, last: the range of images.

        Raises:
            UserError: a worker was killed from outside. The message names its current image.
        """
        if self._num_workers == 0:
            for index in range(first, last):
                yield encode_one(locate(index), self._settings)
            return
        assert self._workers, "closed"
        self._locate, self._next_task = locate, first
        self._num_tasks = _ROW_TASKS if first < last and isinstance(locate(first), RowLocation) else _TASKS
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
                slot.release()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        worker = _Worker(self._settings)
        self._workers[worker.fileno()] = worker
        self._poll.register(worker.fileno(), select.POLLIN)

    def _assign(self, wanted: int, last: int) -> None:
        """Assigns images to the workers.

        Images ahead of `wanted`, the next one to be yielded, are assigned only while the buffer has room. The image
        `wanted` itself always is: otherwise a full buffer would wait for an image that nobody encodes.
        """
        ahead = wanted + 4 * self._num_tasks * len(self._workers)
        free = [worker for worker in self._workers.values() if len(worker.tasks) <= self._num_tasks // 2]
        for worker in sorted(free, key=lambda worker: len(worker.tasks)):
            tasks: list[tuple[int, ImageLocation]] = []
            while len(worker.tasks) + len(tasks) < self._num_tasks:
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
                worker.assign(tasks)

    def _receive(self) -> None:
        """Takes the images that the workers have finished, and replaces workers that hang or have died."""
        start_time = time.monotonic()
        events = self._poll.poll(1000 * _CHECK_SECONDS)
        # Only the time of waiting counts, and only up to a limit, because this process or the machine may have been
        # stopped in between.
        self._waited += min(time.monotonic() - start_time, 5 * _CHECK_SECONDS)
        for descriptor, _ in events:
            worker = self._workers[descriptor]
            try:
                worker.read_notices()
                self._take(worker, worker.num_notified)
            except (EOFError, OSError):
                self._replace(worker, None)
        if self._waited >= _CHECK_SECONDS:
            waited, self._waited = self._waited, 0.0
            for worker in list(self._workers.values()):
                self._check(worker, waited)

    def _take(self, worker: _Worker, count: int) -> None:
        for index, result, slot in worker.take(count):
            self._done[index] = result, slot
            self._buffered += slot.size

    def _check(self, worker: _Worker, waited: float) -> None:
        """Takes the images that a worker had finished at the last check, and replaces the worker if it hangs.

        A worker that is at a slow image has not sent a notice of the images before it, and the next image to be yielded
        may be one of them. They are taken one check later because the count alone does not say that the answers are
        visible to this process (`WorkerProcess.finished`).

        A worker hangs if its current image has taken too much processor time, or if it sleeps for too long. A worker
        that waits for a disk or is stopped does not hang.
        """
        with suppress(EOFError, OSError):  # a worker that has died is noticed when its notices are read
            self._take(worker, worker.num_seen)
        num_finished = worker.finished()
        if num_finished != worker.num_seen or not worker.ready or not worker.tasks:
            worker.begin_watch(num_finished)
            return
        worker.waited += waited
        if worker.waited < _ACTIVITY_SECONDS:
            return
        waited, worker.waited = worker.waited, 0.0
        state, cpu_seconds = worker.activity()
        if worker.finished() != worker.num_seen:  # the processor time may include that of the next image
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
        """The size of an image's file in whole MB. For a row, a hundredth of the rows before it is added.

        They must be decoded first, which takes a second for some 500 MB.
        """
        location = self._locate(index)
        if isinstance(location, RowLocation):
            return int(_SECONDS_PER_MB * location.size * (1 + location.row / 100)) // 1_000_000
        try:
            size = os.path.getsize(location.path) if location.size is None else location.size
        except OSError:  # the file was removed, but the worker may have read it before
            size = 0
        return int(_SECONDS_PER_MB * size) // 1_000_000

    def _replace(self, worker: _Worker, reason: str | None) -> None:
        """Ends a worker and starts another one. Its current image is bad; the others are assigned again.

        `reason` is the reason of the image, or None if the worker has died; then its exit status gives the reason. If
        the status does not point to the decoder, there is no new worker but a failure.
        """
        self._poll.unregister(worker.fileno())
        del self._workers[worker.fileno()]
        if reason is None:
            status = worker.end(timeout=5)  # it has closed its end of the pipe, so it has ended or is about to
            with suppress(EOFError, OSError):  # an image that was received incompletely is its current image
                self._take(worker, worker.finished())
        worker.close()
        if reason is None:
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            if not worker.ready:
                raise UserError(f"a worker process cannot start ({name}); see its message above")
            image = f"{self._locate(worker.tasks[0]).name}: " if worker.tasks else ""
            if status >= 0 or -status not in _CRASHES or not worker.tasks:
                self._failure = UserError(
                    f"{image}its worker process was ended by {name}{' (out of memory?)' if status == -9 else ''}; "
                    "the same command goes on from here"
                )
                return
            reason = f"the decoder crashes ({name}); replace or remove it"
        self._done[worker.tasks.popleft()] = Bad(reason), None
        self._unassigned.extend(worker.tasks)
        self._unassigned = deque(sorted(self._unassigned))
        self._start()
