"""Commits a conversion: flushes what is written so far to the disk, then appends a line to the journal.

The order is what makes a conversion restartable after a kill or a power failure: first the data, then the records, then
the journal, each with an fsync. A line in the journal thus never claims more than the disk holds. Data and records
beyond the last line may be incomplete; the next run cuts them off and converts those images again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from sdpnet.preprocess.conversion.journal import BadImage, Commit, Journal
from sdpnet.preprocess.conversion.writers.records import Records

__all__ = ["Committer"]

COMMIT_SECONDS: Final = 1.0


class Committer:
    """Commits about once a second, in a thread of its own, so that the conversion does not wait for the disk.

    Attributes:
        bad: the bad images since the last commit.

    Args:
        split: the name of the split.
        sync: waits until everything that the writer was given is on the disk. It is called from the thread.
        records: the records of the split.
        journal: the journal of the conversion.
    """

    def __init__(self, split: str, sync: Callable[[], None], records: Records, journal: Journal) -> None:
        self.split, self.records, self.journal = split, records, journal
        self.bad: list[BadImage] = []
        self._sync = sync
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future[None] | None = None
        self._committed = records.count
        self._time = time.monotonic()

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is not None and not isinstance(error, OSError):
                self.commit()  # after a bad image or Ctrl-C, the next run continues from here
        finally:
            self._thread.shutdown()

    def tick(self) -> None:
        """Starts a commit if it is time and no other commit is running."""
        if time.monotonic() - self._time < COMMIT_SECONDS:
            return
        if self._running is not None and not self._running.done():
            return
        self._start()

    def commit(self) -> None:
        """Commits everything and waits for it."""
        self._wait()
        if self.records.count > self._committed:
            self._start()
            self._wait()

    def _start(self) -> None:
        # Ctrl-C may come between any two of these lines. A bad image may then be written twice; readers of the journal
        # identify it by its index.
        self._wait()
        count, crc32 = self.records.done
        bad = tuple(image for image in self.bad if image.index < count)
        self._running = self._thread.submit(self._write, Commit(self.split, count, crc32, bad))
        self.bad = self.bad[len(bad) :]
        self._committed = count
        self._time = time.monotonic()

    def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def _write(self, entry: Commit) -> None:
        self._sync()
        self.records.sync()
        self.journal.append(entry)
