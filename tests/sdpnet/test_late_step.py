"""Steps in which the host never waits for the device, forced upon a CPU; with a GPU, what torch itself calls a wait."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import arguments, metrics, weights
from trainings_of_ranks import GLOBAL_BATCH, case, in_order, resumed, run

import sdpnet.train
import sdpnet.training.step
from sdpnet.checkpoints.model import latest_checkpoint, load_checkpoint
from sdpnet.distributed.processes import AsyncRead
from sdpnet.execution.hardware import StepChoices, choose_step
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.pipelines.augment import DeviceStage

pytestmark = pytest.mark.gpu

SETTINGS = ["ema.decay=0.9", "optim.warmup_epochs=0.5", "augment.fused=off"]


class Waiting(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises where a value or a shape that depends on values would have to come from the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2"):
            raise Waiting(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Steps as on a GPU, or with False the ordinary ones, both with a fused AdamW."""

    def force(late: bool) -> None:
        def choose(*args: Any, **options: Any) -> StepChoices:
            return replace(choose_step(*args, **options), asynchronous=late)

        monkeypatch.setattr(sdpnet.training.step, "choose_step", choose)
        monkeypatch.setattr(
            sdpnet.training.step, "make_optimizer", lambda *args, fused: make_optimizer(*args, fused=True)
        )

    return force


def spoil(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Makes these training batches, counted from 1, not finite."""
    stage, count = DeviceStage.__call__, [0]

    def spoilt(self: DeviceStage, batch: Any) -> Any:
        images, targets = stage(self, batch)
        count[0] += self.train
        return (images * float("nan") if self.train and count[0] in calls else images), targets

    monkeypatch.setattr(DeviceStage, "__call__", spoilt)


def test_nothing_is_waited_for_within_a_step(
    late: Callable[[bool], None], shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = sdpnet.train.take_step

    def refuse(*args: Any) -> Any:
        raise Waiting

    def watched(*args: Any) -> Any:
        begin, read, of_this_step = AsyncRead.__init__, AsyncRead.read, []

        def note(self: AsyncRead, values: torch.Tensor) -> None:
            begin(self, values)
            of_this_step.append(self)

        def read_earlier(self: AsyncRead) -> Any:
            return refuse() if any(self is other for other in of_this_step) else read(self)

        with NoWaiting(), pytest.MonkeyPatch.context() as patched:
            for name in ("cpu", "tolist"):  # a CPU's tensor needs nothing for them
                patched.setattr(torch.Tensor, name, refuse)
            patched.setattr(AsyncRead, "__init__", note)
            patched.setattr(AsyncRead, "read", read_earlier)
            return step(*args)

    monkeypatch.setattr(sdpnet.train, "take_step", watched)
    command = arguments(
        shard_set, tmp_path / "late", *SETTINGS, "optim.clip_grad_norm=1", "train.accumulate=2", pipeline="synthetic"
    )
    late(True)
    assert sdpnet.train.main(command) == 0
    late(False)
    with pytest.raises(Waiting):  # so the ordinary step is caught
        sdpnet.train.main([*command, "--out", str(tmp_path / "at once")])


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_late_or_at_once_it_is_the_same_run(
    policy: str,
    late: Callable[[bool], None],
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two bad batches of twelve, one of them an epoch's last, with a checkpoint after each step for the rollbacks."""
    said, state = {}, {}
    settings = [*SETTINGS, f"train.on_nonfinite={policy}", "train.checkpoint_interval=1"]
    for name in ("late", "at once"):
        late(name == "late")
        with monkeypatch.context() as patched:
            spoil(patched, 3, 6)
            assert sdpnet.train.main(arguments(shard_set, tmp_path / name, *settings)) == 0
        said[name] = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
        state[name] = load_checkpoint(latest_checkpoint(tmp_path / name / "checkpoints"))  # type: ignore[arg-type]
    assert said["late"] == said["at once"] and len(said["late"]) == 2
    late_lines, lines = ([json.dumps(line) for line in metrics(tmp_path / name)] for name in said)
    assert [line for line in late_lines if "NaN" not in line][:2] == lines[:2] and len(late_lines) == len(lines)
    ours, theirs = weights(tmp_path / "late"), weights(tmp_path / "at once")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert state["late"]["ema_updates"] == state["at once"]["ema_updates"] == 10
    assert state["late"]["guard"] == state["at once"]["guard"] == {"bad_steps": [3, 6]}


def test_a_run_that_stops_says_the_bad_step(
    late: Callable[[bool], None],
    shard_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    late(True)
    spoil(monkeypatch, 3)
    assert sdpnet.train.main(arguments(shard_set, tmp_path)) == 2
    assert "step 3: loss and gradient" in capsys.readouterr().err


def test_stopped_and_resumed(
    late: Callable[[bool], None],
    shard_set: Path,
    tmp_path: Path,
    interrupt: Callable[[int], None],
) -> None:
    late(True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sdpnet.train.main(arguments(shard_set, whole, *SETTINGS)) == 0
    interrupt(4)
    assert sdpnet.train.main(arguments(shard_set, parts, *SETTINGS)) == 128 + signal.SIGINT
    interrupt(-1)
    assert sdpnet.train.main(["--resume", *arguments(shard_set, parts, *SETTINGS)]) == 0
    assert metrics(whole) == metrics(parts)


def test_several_processes_stop_after_the_same_step(shard_set: Path, tmp_path: Path) -> None:
    """A step later than the signal's, but at an epoch's end; resumed, it is the same run."""
    stops = {"in an epoch": ["step", 1, 2], "an epoch's last step": ["step", 0, 6]}
    whole, *stopped = (
        {**case(shard_set, tmp_path / name, 2, stop=stop), "asynchronous": True}
        for name, stop in {"whole": None, **stops}.items()
    )
    again = [{**resumed(of), "asynchronous": True} for of in stopped]
    results = run([whole, *stopped, *again], 2, tmp_path / "scratch")
    order = in_order(results[0], GLOBAL_BATCH // 2)
    for taken, first, second in zip((3, 6), results[1:3], results[3:], strict=True):
        assert [rank["status"] for rank in first] == [128 + signal.SIGTERM] * 2
        assert [len(rank["samples"]) for rank in first] == [taken] * 2
        assert in_order(first, GLOBAL_BATCH // 2) + in_order(second, GLOBAL_BATCH // 2) == order
    for name in stops:
        assert metrics(tmp_path / "whole") == metrics(tmp_path / name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_is_waited_for_on_a_gpu(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = sdpnet.train.take_step, [0]

    def watched(*args: Any) -> Any:
        count[0] += 1
        if count[0] < 4:  # the first ones allocate, compile and send constants
            return step(*args)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
                torch.cuda.set_sync_debug_mode("error")
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(sdpnet.train, "take_step", watched)
    assert sdpnet.train.main(arguments(shard_set, tmp_path, "ema.decay=0.9", pipeline="synthetic")) == 0
    assert count[0] == 12
