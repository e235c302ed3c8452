"""Looks at many images in worker processes, in order.

    chunks of locations -> [process: look_at each] x num_workers -> the records of each chunk

A process gets a chunk on its standard input and answers with a record for each image. It ends with its parent, however
that ends, because its input ends then.
"""

from __future__ import annotations

import marshal
import os
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

import sdpnet
from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.adoption.look import Look, Opened, look_at

__all__ = ["CHUNK", "RECORD", "Chunk", "Lookers", "work"]

CHUNK: Final = 256  # the number of images that a process is given at a time
# The fields of `Seen`.
RECORD: Final = struct.Struct("<qqqIHHB")
_SIZE: Final = struct.Struct("<I")
_ROOT: Final = Path(sdpnet.__file__).resolve().parent.parent

Chunk = list[tuple[str, int, int | None]]  # path, offset, size


class Lookers:
    """Processes that look at images. A context manager.

    Args:
        look: what is looked at.
        num_workers: the number of processes; 0 looks in this process.
    """

    def __init__(self, look: Look, num_workers: int) -> None:
        self._look, self._num_workers = look, num_workers
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._processes = [_start(look) for _ in range(num_workers)]
        for process in self._processes:
            self._idle.put(process)

    def __enter__(self) -> Lookers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # of a chunk that was not sent completely
                    pipe.close()

    def map(self, chunks: Iterable[Chunk]) -> Iterator[bytes]:
        """Yields the records of each chunk, in order. Raises `UserError` if a process was ended from outside."""
        if self._num_workers == 0:
            opened = Opened()
            yield from (_records(opened, chunk, self._look) for chunk in chunks)
            opened.close()
            return
        waiting: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(self._num_workers, thread_name_prefix="look") as threads:
            for chunk in chunks:
                waiting.append(threads.submit(self._ask, chunk))
                if len(waiting) > 2 * self._num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _ask(self, chunk: Chunk) -> bytes:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        message = marshal.dumps(chunk)
        try:
            process.stdin.write(_SIZE.pack(len(message)) + message)
            process.stdin.flush()
            answer = process.stdout.read(RECORD.size * len(chunk))
        except (BrokenPipeError, ValueError):
            answer = b""
        if len(answer) != RECORD.size * len(chunk):
            status = process.wait()
            self._idle.put(process)
            why = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise UserError(f"a process that looks at the images was ended ({why}); repeat the command")
        self._idle.put(process)
        return answer


def _start(look: Look) -> subprocess.Popen[bytes]:
    path = [*(entry or os.getcwd() for entry in sys.path), str(_ROOT)]
    start = "from sdpnet.preprocess.adoption.lookers import work"
    code = f"import sys; sys.path[:] = {path!r}; {start}; work({tuple(look)!r})"
    command = [sys.executable, "-S", "-c", code]  # without `site`, whose only effect here would be the path
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def work(look: tuple[bool, bool, str]) -> None:
    """The main function of a worker process. Returns when its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    answers, opened = os.fdopen(os.dup(1), "wb", 0), Opened()
    os.dup2(2, 1)
    chunks: IO[bytes] = sys.stdin.buffer
    try:
        while len(header := chunks.read(_SIZE.size)) == _SIZE.size:
            answer = memoryview(_records(opened, marshal.loads(chunks.read(_SIZE.unpack(header)[0])), Look(*look)))
            while answer:
                answer = answer[answers.write(answer) or 0 :]
    except (BrokenPipeError, EOFError):
        pass


def _records(opened: Opened, chunk: Chunk, look: Look) -> bytes:
    return b"".join(RECORD.pack(*look_at(opened, *image, look)) for image in chunk)
