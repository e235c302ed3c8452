"""A save that is killed, or refused by the disk, never costs more than itself: the checkpoints before it can be loaded,
the best one is there, and the next start tidies up."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoint_faults import SCORES, save_steps, saves, state_of
from equality import equal
from faults import CALLS, Commands, Fault

from sdpnet.checkpoints.directory import Checkpoints, latest_checkpoint
from sdpnet.checkpoints.file import load_checkpoint

THIRD = r"step_00000003\.pt"
POINTS = {
    "before the file": Fault("open", THIRD),
    "after the file was made": Fault("open", THIRD, action="kill after"),
    "before its first byte": Fault("pwrite", THIRD),
    "in a weight": Fault("pwrite", THIRD, 30, "kill half"),
    "near its end": Fault("pwrite", THIRD, 66, "kill half"),
    "before its fsync": Fault("fsync", THIRD),
    "after its fsync": Fault("fsync", THIRD, action="kill after"),
    "before its rename": Fault("replace", THIRD),
    "after its rename": Fault("replace", THIRD, action="kill after"),
    "before the directory's fsync": Fault("fsync", r"checkpoints$", 5),
    "before the new best": Fault("io.open", "best", 2),
    "in the new best": Fault("pwrite", "best", 2, "kill half"),
    "before the fsync of the new best": Fault("fsync", "best", 2),
    "before the rename of the new best": Fault("replace", "best", 2),
    "after the rename of the new best": Fault("replace", "best", 2, "kill after"),
    "before the old best goes": Fault("unlink", r"step_00000001\.pt"),
    "after an old one has gone": Fault("unlink", r"step_00000001\.pt", action="kill after"),
}
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with saves() as running:
        yield running


def returned(out: Path) -> int:
    """The step whose save returned last."""
    return int(Path(f"{out}.progress").read_bytes() or b"0")


def require_loadable(out: Path, asynchronous: bool, elements: int = 300) -> int:
    """Every checkpoint is whole, the newest at most one save behind, the best is there. Returns the newest's step."""
    files = sorted(out.glob("step_*.pt")) if out.exists() else []
    for path in files:
        assert equal(load_checkpoint(path), state_of(int(path.stem[5:]), elements))
    newest = int(files[-1].stem[5:]) if files else 0
    assert newest >= returned(out) - asynchronous
    best = Checkpoints(out, 2).best()
    assert (best is None) == (newest == 0 or not (out / "best.json").exists())
    if newest > 1:
        assert best in files
    return newest


def require_continued(commands: Commands, out: Path, asynchronous: bool, first: int) -> None:
    """Saves the rest: what is there then is what an unbroken series leaves."""
    steps = tuple(range(first, 6))
    ended = save_steps(commands, out, steps, asynchronous=asynchronous)
    assert ended.status == 0, ended.stderr
    assert sorted(os.listdir(out)) == ["best.json", "step_00000004.pt", "step_00000005.pt"]
    assert Checkpoints(out, 2).best() == out / "step_00000004.pt" and SCORES[3] == max(SCORES)
    assert equal(load_checkpoint(out / "step_00000005.pt"), state_of(5))


@MODES
@pytest.mark.parametrize("fault", POINTS.values(), ids=POINTS)
def test_killed_at_a_named_point(commands: Commands, tmp_path: Path, fault: Fault, asynchronous: bool) -> None:
    out = tmp_path / "checkpoints"
    ended = save_steps(commands, out, asynchronous=asynchronous, fault=fault)
    assert ended.status == -signal.SIGKILL, ended
    newest = require_loadable(out, asynchronous)
    assert newest >= 1
    require_continued(commands, out, asynchronous, newest + 1)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("lost", [r"\.pt", "best", "."])
@pytest.mark.parametrize("seed", range(4))
def test_power_is_lost(commands: Commands, tmp_path: Path, seed: int, lost: str, asynchronous: bool) -> None:
    """Files lose what was not fsynced; what has its final name is whole all the same."""
    out = tmp_path / "checkpoints"
    unbroken = save_steps(commands, tmp_path / "whole", asynchronous=asynchronous)
    calls = sum(number for call, number in unbroken.calls.items() if call in CALLS)
    nth = 1 + int(np.random.default_rng(seed).integers(calls))
    ended = save_steps(commands, out, asynchronous=asynchronous, fault=Fault("*", "", nth, "kill after", lost=lost))
    assert ended.status == -signal.SIGKILL
    newest = require_loadable(out, asynchronous)
    require_continued(commands, out, asynchronous, newest + 1)


@MODES
@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(commands: Commands, tmp_path: Path, times: int, asynchronous: bool) -> None:
    """As it comes from outside, again and again over one directory, with the real disk."""
    out = tmp_path / "checkpoints"
    rng = np.random.default_rng(int(asynchronous))
    newest = 0
    for _ in range(times):
        ended = save_steps(commands, out, asynchronous=asynchronous, seconds=float(rng.uniform(0.02, 0.4)))
        assert ended.status == -signal.SIGKILL, ended
        newest = max(newest, require_loadable(out, asynchronous, 100_000))
    assert newest > 1 or times == 2


@pytest.mark.parametrize(("action", "asynchronous"), [("ENOSPC", True), ("EIO", False)])
@pytest.mark.parametrize("name", [name for name, fault in POINTS.items() if fault.action != "kill after"])
def test_the_disk_refuses(commands: Commands, tmp_path: Path, name: str, action: str, asynchronous: bool) -> None:
    """One line says so, and the next save, or the same again at the end, is the second try. Another error than a full
    disk comes once; a full disk stays full for the files that the fault names, which may not be those of the second
    try."""
    out = tmp_path / "checkpoints"
    fault = POINTS[name]
    refusal = Fault(fault.call, fault.path, fault.nth, action, lasting=action == "ENOSPC")
    ended = save_steps(commands, out, asynchronous=asynchronous, fault=refusal)
    reason = os.strerror(getattr(errno, action))
    first, *more = ended.stderr.splitlines()
    assert f"cannot be written ({reason}); trying once more" in first
    newest = require_loadable(out, asynchronous)
    if action == "EIO" or ended.status == 0:
        assert ended.status == 0 and not more and newest == 4, ended.stderr
    else:
        assert ended.status == 2 and len(more) == 1, ended.stderr
        assert more[0].startswith("error: ") and reason in more[0] and "is still there" in more[0]
    assert newest >= 1 and not list(out.glob(".*"))
    # A checkpoint whose last fsync was refused is whole, but its score is not noted: it is saved again here.
    unnoted = ended.status == 2 and name == "before the directory's fsync"
    require_continued(commands, out, asynchronous, newest if unnoted else newest + 1)


@MODES
def test_writes_that_take_little(commands: Commands, tmp_path: Path, asynchronous: bool) -> None:
    out = tmp_path / "checkpoints"
    fault = Fault("pwrite", "", 1, "short", lasting=True)
    ended = save_steps(commands, out, asynchronous=asynchronous, fault=fault)
    assert ended.status == 0 and require_loadable(out, asynchronous) == 4


def test_an_unbroken_series(commands: Commands, tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    require_continued(commands, tmp_path / "checkpoints", True, 1)
