"""The checkpoints of a run: the newest ones and the best one, saved while training goes on.

step_XXXXXXXX.pt    the state of the run after XXXXXXXX steps
best.json           {"step", "score"} of the best checkpoint

The order of the writes of one save makes every moment safe to be killed in:

1. The new checkpoint is written under a temporary name, synced to the disk and renamed.
2. `best.json` is replaced where the new checkpoint is the best one. It now names a file that is complete.
3. Only then are older checkpoints removed, so that neither the newest nor the best one is ever missing.
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
    """The checkpoints of a directory, sorted by step; an empty list where the directory does not exist."""
    names = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in names if _NAME.fullmatch(path.name)), key=_step)


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


class Checkpoints:
    """Saves states to `directory` and removes the checkpoints that need not be kept.

    It is for the one process that holds the run's directory. The process may be killed at any moment: older checkpoints
    stay until the new one is complete, and `best` always names an existing file. The temporary files of a killed save
    are removed here.

    A save that the system refuses is tried once more, with the state of that later moment; `has_failed` tells the
    training loop to call `save` again. A method raises an error only if the second try fails as well.

    Args:
        keep: the number of newest checkpoints that are kept.
        keep_best: whether the checkpoint with the highest score is kept as well.
        asynchronous: `save` returns as soon as the state is copied to host memory, and a thread writes the file.
        say: is called with one line of text when a save has failed, and when the disk has no room for another
            checkpoint. The thread may call it.
        require_own: raises `OSError` where a save would be written into another run's directory.
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
        self._refused: tuple[int, dict[str, Any], float | None] | None = None  # the arguments of the last save
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
        """Whether the last save has ended with an error, so that `save` should be called now. Does not wait."""
        return self._error is not None and (self._thread is None or not self._thread.is_alive())

    def save(self, step: int, state: dict[str, Any], score: float | None = None) -> None:
        """Saves the state after `step` steps, then removes older checkpoints and those of later steps.

        Checkpoints of later steps come from a run that was continued from an earlier checkpoint. `save` first waits for
        the save before it. If the system has refused that one, this call is the second try and returns when the file is
        on the disk. The caller may change the state as soon as `save` has returned.

        Args:
            score: higher is better; NaN is never the best.

        Raises:
            UserError: the system has refused the second try too, or a weight is not finite. Earlier checkpoints stay.
        """
        again = self._wait_for_last()
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
                self._wait_for_last()  # raises the error, if there is one
        else:
            arguments = (step, state, score)
            self._thread = threading.Thread(target=self._write_or_note, args=arguments, name="checkpoint")
            self._thread.start()

    def finish(self, step: int, score: float | None) -> None:
        """Completes the save of `step` where the process was killed after it had written the checkpoint.

        Updates `best.json` if `score` is the best one and removes older checkpoints. Checkpoints of later steps stay.
        """
        path = _path(self._directory, step)
        if path.is_file():
            with refusals(path):
                self._require_own()
                self._note_best(step, score)
                self._remove_old(step, abandoned=False)

    def wait(self) -> None:
        """Returns when the last save is on the disk. A save that the system has refused is tried once more."""
        error = self._wait_for_last()
        if error is not None:
            assert self._refused is not None
            step, state, score = self._refused
            self._say(f"{error.cause}; trying once more")
            self._write(step, state, score)

    def close(self) -> None:
        """Waits as `wait` does and frees the host memory of the copies."""
        try:
            self.wait()
        finally:
            self._refused = None
            if self._host is not None:
                self._host = HostCopy()

    def _wait_for_last(self) -> Refusal | None:
        """Waits for the last save. Returns the system's refusal of it, once, and raises any other error of it."""
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
                # In a synchronous save the state's tensors are the model's own, and training goes on changing them.
                self._refused = step, state if self._host is not None else HostCopy()(state), score
            self._error = error

    def _write(self, step: int, state: dict[str, Any], score: float | None) -> None:
        path = _path(self._directory, step)
        with refusals(path):
            self._require_own()
            # This order of writes is safe to be killed in at any point; see the docstring of the module.
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
        """Removes the checkpoints up to `step` that need not be kept, and with `abandoned` all later ones.

        A run may continue from an earlier checkpoint than the newest file, for instance because newer files are
        damaged. Its first save then makes the later files obsolete: their steps will be trained again.
        """
        files = [path for path in list_checkpoints(self._directory) if not path.is_dir()]
        older = [path for path in files if _step(path) <= step]
        kept = {*older[-self._keep :], *({self.best()} & set(older))}
        for path in files if abandoned else older:
            if path not in kept:
                path.unlink()

    def _best(self, newest: float = math.inf) -> tuple[int | None, float]:
        """(step, score) of the best checkpoint, if it exists and its step is at most `newest`; else (None, -inf)."""
        try:
            best = json.loads(read_small(self._directory / BEST_NAME))
            step, score = int(best["step"]), float(best["score"])
            exists = step <= newest and _path(self._directory, step).is_file()
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None, -math.inf
        return (step, score) if exists else (None, -math.inf)

    def _warn_of_full_disk(self, size: int) -> None:
        with suppress(OSError):  # some file systems do not report their free space
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
