"""Runs trainings as processes of the `train` command, each with its output in a log beside its directory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sdpnet.checkpoints.model import latest_checkpoint
from sdpnet.config.load import flat_values
from sdpnet.config.yaml_text import parse_yaml
from sdpnet.lab.experiment import Training
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish_bytes

__all__ = ["is_finished", "log_of", "run_trainings"]

_POLL_SECONDS = 0.1


def log_of(training: Training) -> Path:
    """The file with the output of a training."""
    return training.directory.with_name(f"{training.directory.name}.log")


def is_finished(training: Training) -> bool:
    """Whether a training has ended earlier.

    Raises `UserError` if another training is in its directory: the experiment has changed since.
    """
    own = training.directory / "config.yaml"
    if own.is_file():
        before, now = (dict(flat_values(parse_yaml(text))) for text in (own.read_text(), training.config_text))
        changed = [key for key in now if before.get(key) != now[key]] or [key for key in before if key not in now]
        if changed:
            raise UserError(
                f"{training.directory}: was trained with {changed[0]} = {before.get(changed[0])}, not "
                f"{now.get(changed[0])}; remove it to train it again, or pass another --out"
            )
    return (training.directory / "model.json").is_file()


def run_trainings(
    trainings: Sequence[Training],
    jobs: int,
    ended: Callable[[Training, int, float], None],
    proceed: Callable[[Training], bool] = lambda training: True,
) -> None:
    """Runs trainings, `jobs` at a time, in their order. One that was interrupted continues from its checkpoint.

    If this process is interrupted or killed, the trainings save a checkpoint and end.

    Args:
        ended: is called with each training that has ended, its exit status, and its seconds.
        proceed: is called with each training before it starts; none starts after it has returned False.
    """
    waiting, running = list(trainings), list[tuple[Training, subprocess.Popen[bytes], float]]()
    with _terminated_as_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    training = waiting.pop(0)
                    if not proceed(training):
                        waiting.clear()
                        break
                    running.append((training, _start(training, jobs), time.monotonic()))
                for entry in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove(entry)
                    training, process, began = entry
                    ended(training, process.returncode, time.monotonic() - began)
                time.sleep(_POLL_SECONDS if running else 0)
        finally:
            for _, process, _ in running:
                process.send_signal(signal.SIGTERM)
            for _, process, _ in running:
                process.wait()


def _start(training: Training, jobs: int) -> subprocess.Popen[bytes]:
    training.directory.parent.mkdir(parents=True, exist_ok=True)
    config = training.directory.with_name(f"{training.directory.name}.yaml")
    publish_bytes(config, training.config_text.encode())
    words = ["--config", str(config), "--out", str(training.directory)]
    words += ["--resume"] if latest_checkpoint(training.directory / "checkpoints") is not None else []
    alone = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    with open(log_of(training), "ab") as log:
        # In a session of its own, it does not get the terminal's Ctrl-C: this process sends it one signal.
        return subprocess.Popen(
            [sys.executable, "-m", "sdpnet.train", *words],
            env={**os.environ, **alone},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """Asks Linux for SIGTERM when the parent ends, even if it was killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP raise `SystemExit`, so that the trainings are ended in order."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
