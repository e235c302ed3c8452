"""What a training says and saves while its terminal, pipe or disk fails: it goes on, or ends with a checkpoint."""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest
from faulty_trainings import LAST_STEP, arguments, final, refused
from launches import environment, wait_for_step
from trainings import metrics, stop_after

import sdpnet.train
import sdpnet.training.scoring
from sdpnet.checkpoints import directory as checkpoint_directory
from sdpnet.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def lost(kind: str) -> Iterator[TextIO | None]:
    """A stdout that takes nothing, or not everything."""
    if kind == "closed":
        yield None
    elif kind == "full disk":
        with open("/dev/full", "w", encoding="utf-8") as stream:
            yield stream
    elif kind == "latin-1":
        yield io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    else:
        read, write = os.pipe()
        os.close(read)
        with open(write, "w", encoding="utf-8") as stream:
            yield stream


@pytest.mark.parametrize("kind", ["pipe", "full disk", "latin-1", "closed"])
def test_output_does_not_decide_over_training(
    kind: str, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "\u732b"  # in no character set of the West
    with lost(kind) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(arguments(shard_set, out)) == 0
    assert [line["step"] for line in metrics(out) if "train_loss" in line] == list(range(1, LAST_STEP + 1))
    assert (out / "model.safetensors").exists()
    reason = {"pipe": "Broken pipe", "full disk": "No space left on device"}.get(kind)
    goes_on = f"stdout is lost ({reason}): training goes on; {out / 'metrics.jsonl'} has its figures\n"
    assert capsys.readouterr().err == (goes_on if reason else "")


def test_a_terminal_that_is_closed(shard_set: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and the terminal takes no more lines: the run is saved as after Ctrl-C."""
    command = arguments(shard_set, tmp_path, "train.epochs=1000", "optim.warmup_epochs=0")
    terminal, other_end = os.openpty()

    def take_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(other_end, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "sdpnet.train", *command],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        env=environment(),
        text=True,
        preexec_fn=take_the_terminal,
    )
    try:
        os.close(other_end)
        waiting = threading.Thread(target=wait_for_step, args=(tmp_path, 3, process))
        waiting.start()
        while waiting.is_alive():
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 1 << 16)
        os.close(terminal)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    assert final(tmp_path)["cursor"]["step"] == metrics(tmp_path)[-1]["step"]


def full_disk(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first so many checkpoints find no space."""
    write, left = checkpoint_directory.write_checkpoint, [times]

    def writing(path: Path, state: dict[str, Any]) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        return write(path, state)

    monkeypatch.setattr(checkpoint_directory, "write_checkpoint", writing)


def test_a_save_that_failed_is_noticed_at_the_next_step_and_tried_once_more(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the state of that step. When it fails again, the run ends."""
    with monkeypatch.context() as patched:
        full_disk(1, patched)
        assert main(arguments(shard_set, tmp_path / "once")) == 0
    saved = sorted(int(path.stem[5:]) for path in (tmp_path / "once" / "checkpoints").glob("step_*"))
    assert saved == [3, 4, 6]
    out, err = capsys.readouterr()
    assert out.count("step_00000002.pt: cannot be written (No space left on device); trying once more, with the ") == 1
    assert err == ""
    full_disk(2, monkeypatch)
    line = refused(arguments(shard_set, tmp_path / "twice"), capsys)
    assert "step_00000003.pt: cannot be written (No space left on device); what was saved before is still" in line
    assert [line["step"] for line in metrics(tmp_path / "twice")] == [1, 2, 3]


@pytest.mark.parametrize("when", ["stopped", "at the end"])
def test_the_last_save_too_is_tried_twice(
    when: str, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk(1, monkeypatch)
    stop_after(5 if when == "stopped" else 0, monkeypatch)
    settings = ["train.checkpoint_interval=0", "train.async_checkpoints=true"]
    assert main(arguments(shard_set, tmp_path, *settings)) == (130 if when == "stopped" else 0)
    assert final(tmp_path)["cursor"]["step"] == (5 if when == "stopped" else LAST_STEP)
    assert "cannot be written (No space left on device); trying once more\n" in capsys.readouterr().out


def test_scores_by_class_that_cannot_be_written(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sdpnet.training.scoring, "write_per_class", full)
    assert main(arguments(shard_set, tmp_path)) == 0
    assert "per_class.csv: cannot be written (No space left on device)\n" in capsys.readouterr().out
