"""The benchmark's child process: it runs one contestant, pinned to cores, and answers one request at a time.

Requests come over a connection whose descriptor is the only argument; `sdpnet.pipelines.benchmarks.process` is the
other end. Only the standard library is imported before the process is pinned, because libraries count the cores when
they are loaded.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Job", "Round", "Started", "Stream", "main"]

WARM_UP = 2  # batches per core that each round takes before it is timed


@dataclass(frozen=True)
class Job:
    """The batches that a contestant has to deliver: the first ones of a plan's epoch 0, repeatedly.

    Attributes:
        contestant: its name.
        data: the path of the shard set.
        split: the split's name.
        mode: "train" (random crops) or "eval" (central crops).
        image_size: pixels a side.
        batch_size: images per batch.
        cores: the numbers of the cores that it may run on. It gets as many threads or workers.
        device: the device of the batches.
        seed: decides all draws of the plan.
    """

    contestant: str
    data: str
    split: str
    mode: Literal["train", "eval"]
    image_size: int
    batch_size: int
    cores: tuple[int, ...]
    device: str
    seed: int = 0

    @property
    def train(self) -> bool:
        return self.mode == "train"


@dataclass(frozen=True)
class Started:
    """The start of a contestant.

    Attributes:
        import_seconds: the time of the imports.
        first_batch_seconds: the time after that, from making the loader to its first batch.
        crops: "plan" if the contestant follows the plan, "own" if it draws its own crops.
    """

    import_seconds: float
    first_batch_seconds: float
    crops: str


@dataclass(frozen=True)
class Round:
    """One measurement.

    Attributes:
        num_images: the number of images that were delivered in the measured time.
        seconds: the measured time.
        checksums: the checksum of each batch's sample ids, in order; empty if the contestant has its own order.
        peak_bytes: the sum of VmHWM of the process and its workers.
        foreign: the share of the cores' time that other processes took; None if Linux does not tell.
    """

    num_images: int
    seconds: float
    checksums: tuple[int, ...]
    peak_bytes: int
    foreign: float | None

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.num_images / self.seconds


class Stream(Protocol):
    """An opened contestant. `crops` is as in `Started`."""

    crops: str

    def batches(self, count: int) -> Generator[tuple[int, np.ndarray | None], None, None]:
        """Yields at least `count` batches: the number of images, and the samples' ids if they follow the plan."""
        ...


def main() -> None:
    """Answers requests until the other end closes the connection."""
    connection = Connection(int(sys.argv[1]))
    try:
        job = Job(**connection.recv())
        os.sched_setaffinity(0, job.cores)
        worker = _Worker(job)
        while True:
            request, *arguments = connection.recv()
            try:
                answer = getattr(worker, request)(*arguments)
            except Exception as error:  # shown in the contestant's row
                answer = _one_line(error)
            connection.send(answer)
    except EOFError:
        os._exit(0)  # the other end is gone; libraries may take long to end


def _one_line(error: Exception) -> str:
    """An error's message in one line."""
    from sdpnet.pipelines.errors import UserError

    while inner := getattr(error, "exceptions", None):  # an ExceptionGroup
        error = inner[0]
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text if len(text) < 300 else text[:300] + '...'}"


class _Worker:
    """The methods are the requests that `BenchProcess` sends."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def start(self) -> Started:
        began = time.perf_counter()
        open_stream = _contestant(self.job)
        import torch

        cuda = self.job.device != "cpu"
        self._finish: Callable[[], Any] = torch.cuda.synchronize if cuda else lambda: None
        self._finish()
        imported = time.perf_counter()
        self._stream = open_stream(self.job)
        batches = self._stream.batches(1)
        next(batches)
        self._finish()
        first = time.perf_counter()
        batches.close()
        return Started(imported - began, first - imported, self._stream.crops)

    def calibrate(self, seconds: float) -> int:
        """The number of batches that take about `seconds` seconds.

        It is a multiple of the number of cores, because workers deliver batches side by side.
        """
        cores = len(self.job.cores)
        count = 2 * cores
        while (took := self.round(count).seconds) < seconds / 2:
            count = cores * math.ceil(count / cores * min(8.0, 1.1 * seconds / took))
        return max(1, round(count / cores * seconds / took)) * cores

    def round(self, count: int) -> Round:
        """Times `count` batches. Batches before and after them are decoded too, so that no start or end is timed."""
        num_images, checksums = 0, []
        batches = self._stream.batches(WARM_UP * len(self.job.cores) + count)
        try:
            for _ in range(WARM_UP * len(self.job.cores)):
                next(batches)
            self._finish()
            busy, own, began = _busy_ticks(self.job.cores), _own_ticks(), time.perf_counter()
            for _ in range(count):
                size, ids = next(batches)
                num_images += size
                if ids is not None:
                    checksums.append(zlib.crc32(ids.tobytes()))
            self._finish()
            seconds = time.perf_counter() - began
            foreign = None
            if busy is not None:
                others = (_busy_ticks(self.job.cores) or 0) - busy - (_own_ticks() - own)
                foreign = max(0.0, others / os.sysconf("SC_CLK_TCK") / (seconds * len(self.job.cores)))
            return Round(num_images, seconds, tuple(checksums), _peak_bytes(), foreign)
        finally:
            batches.close()


def _contestant(job: Job) -> Callable[[Job], Stream]:
    """Imports what a contestant needs and returns the function that opens it."""
    from sdpnet.pipelines.benchmarks.ceilings import CEILINGS, open_ceiling
    from sdpnet.pipelines.benchmarks.peers import PEERS, open_peer

    if job.contestant in PEERS:
        return open_peer(job.contestant)
    if job.contestant in CEILINGS:
        return open_ceiling
    from sdpnet.pipelines.benchmarks.stream import open_pipeline
    from sdpnet.pipelines.errors import BackendMissingError
    from sdpnet.pipelines.executors.registry import why_missing

    if reason := why_missing(job.contestant):
        raise BackendMissingError(reason)
    return open_pipeline


def _family() -> list[int]:
    """The ids of this process and its workers."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def _own_ticks() -> int:
    """The clock ticks for which this process and its workers have run."""
    ticks = 0
    for pid in _family():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks


def _busy_ticks(cores: tuple[int, ...]) -> int | None:
    """The clock ticks for which these cores were not idle, including those that other virtual machines took."""
    ticks = None
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks = (ticks or 0) + user + nice + system + irq + softirq + steal
    return ticks


def _peak_bytes() -> int:
    """The peak memory of this process and its workers, added up."""
    total = 0
    for pid in _family():
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += 1024 * int(line.split()[1])
    return total


if __name__ == "__main__":
    from sdpnet.pipelines.benchmarks import (
        worker as bench_worker,  # so that pickled classes have the module's name, not __main__
    )

    bench_worker.main()
