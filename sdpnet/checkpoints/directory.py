"""The checkpoints of a run: the last ones and the best, saved while training goes on.

step_XXXXXXXX.pt    the state after so many steps
best.json           {"step", "score"} of the best one; it is replaced before the one that it named may go
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from sdpnet.checkpoints.file import Refusal, plain_state, refusals, write_checkpoint
from sdpnet.checkpoints.host_copy import HostCopy
from sdpnet.pipelines.errors import printable
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.files.small import read_small

__all__ = ["BEST_NAME", "Checkpoints", "latest_checkpoint", "list_checkpoints"]

BEST_NAME: Final = "best.json"
_NAME: Final = re.compile(r"step_([0-9]{1,18})\.pt")


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a directory by step, the newest last; none where there is no such directory."""
    names = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in names if _NAME.fullmatch(path.name)), key=_step)


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


class Checkpoints:
    """Saves states and keeps the `keep` newest checkpoints, with `keep_best` also the one of the highest score.

    For the one process that holds the run directory. Whenever the process is killed, the checkpoints that were there
    before a save are there until its own is complete, and `best` names one that is there; what a killed save left is
    removed here. `asynchronous`: `save` returns when the state is copied to host memory, and a thread writes it.

    A save that the system refuses is tried once more, with the state of that moment: `has_failed` says that this is
    due. Only when this fails as well does a method raise an error.

    `say` gets a line when a save has failed, and when the disk has no room for another checkpoint; it may be called
    from the thread. `require_own` raises `OSError` where a save would be written into another run's directory.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        keep_best: bool = True,
        asynchronous: bool = True,
        say: Callable[[str], None] = lambda text: print(printable(text), file=sys.stderr),
        require_own: Callable[[], object] = lambda: None,
    ) -> None:
        self._directory, self._keep, self._keep_best, self._say = directory, keep, keep_best, say
        self._require_own = require_own
        self._host = HostCopy() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._refused: tuple[int, dict[str, Any], float | None] | None = None  # what the last save was to write
        directory.mkdir(parents=True, exist_ok=True)
        with refusals(directory):
            for path in directory.glob(".*.partial"):
                name = path.name.removeprefix(".").removesuffix(".partial")
                if _NAME.fullmatch(name) or name == BEST_NAME:
                    path.unlink()
        if (newest := self.newest()) is not None and newest.is_file():
            self._warn_of_full_disk(newest.stat().st_size)

    def newest(self) -> Path | None:
        """The checkpoint of the highest step that is complete, or None."""
        return latest_checkpoint(self._directory)

    def best(self) -> Path | None:
        """The checkpoint of the highest score, or None."""
        step, _ = self._best()
        return None if step is None else _path(self._directory, step)

    @property
    def has_failed(self) -> bool:
        """Whether the last save is over and has failed, so that the next one should come now; waits for nothing."""
        return self._error is not None and (self._thread is None or not self._thread.is_alive())

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Saves the state after `step` steps, then removes older checkpoints, and newer ones of an abandoned run.

        Waits for the save before it. When the system has refused that one, this is the second try: it is on the disk
        when `save` returns. The state may change when `save` has returned. `score`: higher is better; a NaN is never
        the best.

        Raises `UserError` when a second try was refused too, or a weight is not finite; the checkpoints before it stay.
        """
        again = self._ended()
        if again is not None:
            self._say(f"{again.cause}; trying once more, with the state after step {step}")
        if self._host is None:
            state = plain_state(state, lambda tensor, _: tensor)
        else:
            state = self._host(state)
        if again is not None:
            self._write(step, state, score)
        elif self._host is None:
            self._write_or_note(step, state, score)
            if not isinstance(self._error, Refusal):
                self._ended()  # raises what there is
        else:
            arguments = (step, state, score)
            self._thread = threading.Thread(target=self._write_or_note, args=arguments, name="checkpoint")
            self._thread.start()

    def finish(self, step: int, score: float | None) -> None:
        """Does what a save of `step` does after its checkpoint is written, where a kill came before that: its `score`
        is noted if it is the best one, and older checkpoints go."""
        path = _path(self._directory, step)
        if path.is_file():
            with refusals(path):
                self._require_own()
                self._note_best(step, score)
                self._remove_old(step, abandoned=False)

    def wait(self) -> None:
        """Returns when the last save is on the disk. One that the system has refused is tried once more."""
        error = self._ended()
        if error is not None:
            assert self._refused is not None
            step, state, score = self._refused
            self._say(f"{error.cause}; trying once more")
            self._write(step, state, score)

    def close(self) -> None:
        """Waits as `wait` does and gives the host memory back."""
        try:
            self.wait()
        finally:
            self._refused = None
            if self._host is not None:
                self._host = HostCopy()

    def _ended(self) -> Refusal | None:
        """Waits for the last save; the system's refusal of it, once. Raises any other error of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None and not isinstance(error, Refusal):
            raise error
        return error

    def _write_or_note(self, step: int, state: dict[str, Any], score: float | None) -> None:
        self._refused = None
        try:
            self._write(step, state, score)
        except BaseException as error:
            if isinstance(error, Refusal):
                # Without a thread the state is the model's own, which goes on changing.
                self._refused = step, state if self._host is not None else HostCopy()(state), score
            self._error = error

    def _write(self, step: int, state: dict[str, Any], score: float | None) -> None:
        path = _path(self._directory, step)
        with refusals(path):
            self._require_own()
            size = write_checkpoint(path, state)
            self._note_best(step, score)
            self._remove_old(step)
        self._warn_of_full_disk(size)

    def _note_best(self, step: int, score: float | None) -> None:
        if self._keep_best and score is not None and not math.isnan(score):
            best, best_score = self._best(step)
            if best is None or score > best_score or (best == step and score != best_score):
                publish_bytes(self._directory / BEST_NAME, json.dumps({"step": step, "score": score}).encode())

    def _remove_old(self, step: int, *, abandoned: bool = True) -> None:
        """Removes what need not be kept of the checkpoints up to `step`, and with `abandoned` all later ones."""
        files = [path for path in list_checkpoints(self._directory) if not path.is_dir()]
        older = [path for path in files if _step(path) <= step]
        kept = {*older[-self._keep :], *({self.best()} & set(older))}
        for path in files if abandoned else older:
            if path not in kept:
                path.unlink()

    def _best(self, newest: float = math.inf) -> tuple[int | None, float]:
        """(step, score) of the best one up to the step `newest`."""
        try:
            best = json.loads(read_small(self._directory / BEST_NAME))
            step, score = int(best["step"]), float(best["score"])
            here = step <= newest and _path(self._directory, step).is_file()
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None, -math.inf
        return (step, score) if here else (None, -math.inf)

    def _warn_of_full_disk(self, size: int) -> None:
        with suppress(OSError):  # a disk that does not say
            free = shutil.disk_usage(self._directory).free
            if free < size:
                self._say(
                    f"{self._directory}: the next checkpoint will not fit: it takes {size / 1e9:.2f} GB and the disk "
                    f"has {free / 1e9:.2f} GB left; free some"
                )


def _path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}.pt"


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
