"""Torch's threads on a CPU: the cores that are really free, what the user says, and exact resume whatever the load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from trainings import arguments, same_run, stop_after

from sdpnet.checkpoints.model import latest_checkpoint, load_checkpoint
from sdpnet.execution import threads
from sdpnet.execution.threads import choose_threads, use_threads
from sdpnet.train import main


@pytest.fixture(autouse=True)
def four_idle_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four cores, none busy, all ours; torch has four threads and the environment says nothing."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(threads, "core_share", lambda processes=1: max(1, 4 // processes))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("busy", "count"), [(0.0, 4), (0.4, 4), (0.6, 3), (1.0, 3), (2.0, 2), (3.0, 1), (4.0, 1), (3.7, 1)]
)
def test_cores_that_others_use_get_no_threads(busy: float, count: int) -> None:
    choice = choose_threads(busy=lambda: busy)
    assert choice.count == count and choice.reduced is (count < 4)
    assert ("OMP_NUM_THREADS sets another number" in str(choice)) is (count < 4)
    if count < 4:
        assert str(choice).startswith(f"threads: {count} (of 4 cores: other processes keep {busy:.1f} busy")


def never() -> float:
    raise AssertionError("looked at the load")


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_environment_says_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "4")
    assert str(choose_threads(2, busy=never)) == f"threads: 4 ({name} is set)"
    assert str(choose_threads(recorded=4, busy=never)) == f"threads: 4 ({name} is set)"
    assert "the run began with 2: losses may differ" in str(choose_threads(recorded=2, busy=never))


def test_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "core_share", lambda processes=1: 2)
    assert str(choose_threads(busy=lambda: 0.0)) == "threads: 2 (this process's share of 4 cores)"
    assert choose_threads(busy=lambda: 1.9).count == 2, "two cores are free, and no more may be used"
    assert choose_threads(busy=lambda: 3.1).count == 1


def test_processes_divide_the_cores() -> None:
    assert choose_threads(2, busy=never).count == 2 and choose_threads(3, busy=never).count == 1


def test_torchs_own_number_is_never_raised() -> None:
    torch.set_num_threads(2)
    assert choose_threads(busy=lambda: 0.0).count == 2 and choose_threads(busy=lambda: 4.0).count == 1
    torch.set_num_threads(1)
    assert choose_threads(busy=never).count == 1


def test_a_run_goes_on_with_the_threads_that_it_began_with() -> None:
    torch.set_num_threads(1)
    assert choose_threads(recorded=3, busy=never).count == 3
    choice = choose_threads(recorded=8, busy=lambda: 0.0)
    assert choice.count == 1 and "the run began with 8: losses may differ" in str(choice)


@pytest.mark.parametrize(("begun", "resumed"), [(0.0, 3.9), (3.9, 0.0)])
def test_resume_is_exact_under_another_load(
    begun: float,
    resumed: float,
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def under(load: float, out: Path, *more: str) -> int:
        torch.set_num_threads(4)  # as a new process has them
        choose: Callable[..., threads.ThreadChoice] = lambda *a, **k: choose_threads(*a, **k, busy=lambda: load)  # noqa: E731
        monkeypatch.setattr("sdpnet.training.setup.use_threads", lambda *a: _use(choose(*a)))
        return main([*more, *arguments(shard_set, out)])

    def _use(choice: threads.ThreadChoice) -> threads.ThreadChoice:
        torch.set_num_threads(choice.count)
        return choice

    assert under(begun, tmp_path / "whole") == 0
    count = 1 if begun else 4
    assert f"threads: {count} (" in capsys.readouterr().out
    with monkeypatch.context() as context:
        stop_after(4, context)
        assert under(begun, tmp_path / "cut") == 130
    path = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert path is not None and load_checkpoint(path)["threads"] == count
    capsys.readouterr()
    assert under(resumed, tmp_path / "cut", "--resume") == 0
    assert f"threads: {count} (as the run began" in capsys.readouterr().out
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_torch_gets_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "choose_threads", lambda *_: threads.ThreadChoice(2, "why"))
    assert use_threads().count == torch.get_num_threads() == 2
