from __future__ import annotations

import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_faults import state_of
from equality import equal

from sdpnet.checkpoints import directory as checkpoint_directory
from sdpnet.checkpoints.directory import Checkpoints
from sdpnet.checkpoints.file import load_checkpoint, write_checkpoint
from sdpnet.pipelines.errors import UserError


def steps(directory: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in directory.glob("step_*.pt"))


def nothing(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_and_the_best_are_kept(tmp_path: Path, asynchronous: bool) -> None:
    checkpoints = Checkpoints(tmp_path, 2, True, asynchronous, nothing)
    assert checkpoints.newest() is None and checkpoints.best() is None
    found = []
    for step, score in enumerate([None, 0.3, 0.5, float("nan"), 0.4, 0.5, 0.6, None], start=1):
        checkpoints.save(step, state_of(step), score)
        checkpoints.wait()
        best = checkpoints.best()
        found.append((steps(tmp_path), best and int(best.stem[5:])))
    assert found == [
        ([1], None),
        ([1, 2], 2),
        ([2, 3], 3),
        ([3, 4], 3),
        ([3, 4, 5], 3),
        ([3, 5, 6], 3),
        ([6, 7], 7),
        ([7, 8], 7),
    ]
    assert checkpoints.newest() == tmp_path / "step_00000008.pt"
    checkpoints.close()


def test_the_best_is_remembered_by_the_next_run_and_without_keep_best_there_is_none(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 1, asynchronous=False).save(1, state_of(1), 0.9)
    again = Checkpoints(tmp_path, 1, asynchronous=False)
    again.save(2, state_of(2), 0.8)
    assert again.best() == tmp_path / "step_00000001.pt" and steps(tmp_path) == [1, 2]
    (tmp_path / "best.json").write_text("{")
    assert again.best() is None
    Checkpoints(tmp_path / "other", 1, keep_best=False, asynchronous=False).save(1, state_of(1), 0.9)
    assert os.listdir(tmp_path / "other") == ["step_00000001.pt"]


def test_an_abandoned_run_goes_when_a_new_checkpoint_is_there(tmp_path: Path) -> None:
    """Step 20 is damaged, so the run goes on from 10: with one kept, that must be the new 15."""
    checkpoints = Checkpoints(tmp_path, 1, asynchronous=False)
    write_checkpoint(tmp_path / "step_00000010.pt", state_of(10))
    (tmp_path / "step_00000020.pt").write_bytes(b"damaged")
    (tmp_path / "step_00000030.pt").mkdir()
    checkpoints.save(15, state_of(15))
    assert steps(tmp_path) == [15, 30] and equal(load_checkpoint(tmp_path / "step_00000015.pt"), state_of(15))


def test_the_best_of_an_abandoned_run_goes_with_it(tmp_path: Path) -> None:
    """Step 20 is the best and damaged: what goes on from 10 has a best of its own, lower as it is."""
    checkpoints = Checkpoints(tmp_path, 1, asynchronous=False)
    checkpoints.save(10, state_of(10), 0.5)
    checkpoints.save(20, state_of(20), 0.9)
    (tmp_path / "step_00000020.pt").write_bytes(b"damaged")
    write_checkpoint(tmp_path / "step_00000010.pt", state_of(10))
    checkpoints.save(15, state_of(15), 0.6)
    assert steps(tmp_path) == [15] and checkpoints.best() == tmp_path / "step_00000015.pt"


def test_leftovers_of_a_killed_save_go_and_nothing_else(tmp_path: Path) -> None:
    ours = {".step_00000003.pt.partial", ".best.json.partial"}
    others = {".notes.partial", "step_3.txt", ".step_x.pt.partial"}
    for name in ours | others:
        (tmp_path / name).touch()
    Checkpoints(tmp_path, 1)
    assert set(os.listdir(tmp_path)) == others


def test_a_state_may_change_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next save waits: the host memory is one save's at a time."""
    may_write, waiting = threading.Event(), threading.Event()
    write = checkpoint_directory.write_checkpoint

    def late(path: Path, state: dict) -> int:
        waiting.set()
        assert may_write.wait(30)
        return write(path, state)

    monkeypatch.setattr(checkpoint_directory, "write_checkpoint", late)
    checkpoints = Checkpoints(tmp_path, 9)
    state = state_of(1)
    checkpoints.save(1, state)
    assert waiting.wait(30) and steps(tmp_path) == []
    for tensor in (*state["model"].values(), *state["ema"].values(), state["guard"]["torch"]):
        tensor.zero_()
    second = threading.Thread(target=checkpoints.save, args=(2, state_of(2)))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    may_write.set()
    second.join()
    checkpoints.close()
    assert all(equal(load_checkpoint(tmp_path / f"step_0000000{step}.pt"), state_of(step)) for step in (1, 2))


def test_host_memory_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(checkpoint_directory, "write_checkpoint", lambda path, state: written.append(state) or 0)
    checkpoints = Checkpoints(tmp_path, 1)
    for step in (1, 2):
        checkpoints.save(step, state_of(step))
        checkpoints.wait()
    checkpoints.save(3, state_of(3, elements=5))  # another shape
    checkpoints.wait()
    first, second, third = (state["model"] for state in written)
    assert first["a"].data_ptr() == second["a"].data_ptr() != third["a"].data_ptr()
    assert third["b"].data_ptr() == first["b"].data_ptr() and torch.equal(third["a"], torch.full((5,), 3.0))


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_an_error_of_the_thread_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    lines: list[str] = []
    checkpoints = Checkpoints(tmp_path, 2, say=lines.append)
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    monkeypatch.setattr(checkpoint_directory, "write_checkpoint", full)
    checkpoints.save(2, state_of(2))
    call = {"save": lambda: checkpoints.save(3, state_of(3)), "wait": checkpoints.wait, "close": checkpoints.close}
    message = r"step_0000000{}\.pt: cannot be written \(No space left on device\); .* free some space"
    with pytest.raises(UserError, match=message.format(3 if then == "save" else 2)):
        call[then]()
    assert len(lines) == 1 and re.search(r"step_00000002\.pt: .* left on device\); trying once more", lines[0])
    checkpoints.wait()
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_a_refused_save_is_noticed_and_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, asynchronous: bool
) -> None:
    """With the state of that moment: `save`'s, or the one that was to be saved, whatever became of the model."""
    write, refusals, lines = checkpoint_directory.write_checkpoint, [OSError(28, "No space left on device")], []

    def once_full(path: Path, state: dict) -> int:
        if refusals:
            raise refusals.pop()
        return write(path, state)

    monkeypatch.setattr(checkpoint_directory, "write_checkpoint", once_full)
    checkpoints = Checkpoints(tmp_path, 2, True, asynchronous, lines.append)
    state = state_of(2)
    checkpoints.save(2, state, 0.5)
    if checkpoints._thread is not None:
        checkpoints._thread.join()
    assert checkpoints.has_failed and lines == []
    for tensor in state["model"].values():
        tensor.zero_()
    if then == "save":
        checkpoints.save(3, state_of(3))
    else:
        getattr(checkpoints, then)()
    step = 3 if then == "save" else 2
    assert not checkpoints.has_failed and steps(tmp_path) == [step]
    assert equal(load_checkpoint(tmp_path / f"step_0000000{step}.pt"), state_of(step))
    assert len(lines) == 1 and "No space left on device" in lines[0] and "trying once more" in lines[0]
    assert then == "save" or checkpoints.best() == tmp_path / "step_00000002.pt"
    checkpoints.wait()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_not_the_systems_refusal_is_not_tried_again(tmp_path: Path, asynchronous: bool) -> None:
    checkpoints = Checkpoints(tmp_path, 2, True, asynchronous, nothing)
    state = state_of(1)
    state["model"]["a"][0] = float("nan")
    with pytest.raises(UserError, match=r"not saved, because model\.a is not finite"):
        checkpoints.save(1, state)
        checkpoints.wait()
    assert steps(tmp_path) == [] and not checkpoints.has_failed


def test_a_disk_that_is_nearly_full_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    checkpoints = Checkpoints(tmp_path, 1, asynchronous=False, say=lines.append)
    checkpoints.save(1, state_of(1))
    size = (tmp_path / "step_00000001.pt").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    checkpoints.save(2, state_of(2))
    assert lines == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    checkpoints.save(3, state_of(3))
    Checkpoints(tmp_path, 1, say=lines.append)
    assert len(lines) == 2 and all("the next checkpoint will not fit" in line for line in lines)
