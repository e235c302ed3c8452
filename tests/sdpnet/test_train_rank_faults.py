"""What becomes of a training in several processes when one of them is signalled, fails, is killed or is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launches import TORCHRUN, environment, member, ranks, wait_for_step
from pipeline_batches import installed
from processes import children_of
from trainings import metrics, same_run
from trainings_of_ranks import resumed, run

from sdpnet.checkpoints.model import latest_checkpoint, load_checkpoint
from sdpnet.distributed.run_directory import run_directory

PIPELINE = "native" if installed("native") else "torchvision"
FAILING = [str(Path(__file__).parents[1] / "support" / "failing_rank.py")]
PROMPT = 30.0  # seconds; the processes' own timeout is ten minutes
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


def arguments(data: Path, out: Path, *settings: str) -> list[str]:
    """Two epochs of six steps; saved after every second one."""
    common = ["data.batch_size_per_gpu=2", "data.num_workers=1", "train.epochs=2", "train.checkpoint_interval=2"]
    common += ["train.device=cpu", "ema.decay=0.9", "model.dropout=0.2"]
    command = ["--config", "debug", "--data", str(data), "--out", str(out), "--pipeline", PIPELINE]
    return command + [part for setting in (*common, *settings) for part in ("--set", setting)]


def case(data: Path, out: Path, *settings: str, stop: Any = None, nan: Any = None) -> dict[str, Any]:
    return {"arguments": arguments(data, out, *settings), "stop": stop, "nan": nan}


@pytest.fixture(scope="module")
def whole(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes to which nothing happens."""
    scratch = tmp_path_factory.mktemp("whole")
    ((first, second),) = run([case(shard_set, scratch / "run")], 2, scratch / "scratch")
    assert first["status"] == second["status"] == 0
    return scratch / "run"


def test_a_signal_to_any_process_stops_all(whole: Path, shard_set: Path, tmp_path: Path) -> None:
    """All end with its status after the same step, and the run that continues is the one without a signal."""
    sent = {f"{name} to {at}": (name, at) for name in SIGNALS[:3] for at in (0, 1, [0, 1])}
    sent["SIGHUP to 1"] = ("SIGHUP", 1)
    stopped = [
        case(shard_set, tmp_path / label, stop=["step", at, step, name])
        for step, (label, (name, at)) in enumerate(sent.items(), start=2)
    ]
    results = run([*stopped, *map(resumed, stopped)], 2, tmp_path / "scratch")
    for step, (label, (name, _)) in enumerate(sent.items(), start=2):
        first, second = results[step - 2], results[step - 2 + len(sent)]
        assert [rank["status"] for rank in first] == [128 + signal.Signals[name]] * 2, label
        assert [len(rank["samples"]) for rank in first] == [step] * 2, label
        assert [rank["status"] for rank in second] == [0] * 2, label
        same_run(whole, tmp_path / label)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("SIGUSR1", [1]),
        *(
            pytest.param(name, at, marks=pytest.mark.slow)
            for name in SIGNALS
            for at in ([0], [1], [0, 1])
            if (name, at) != ("SIGUSR1", [1])
        ),
    ],
)
def test_a_signal_from_outside(name: str, at: list[int], shard_set: Path, tmp_path: Path) -> None:
    with ranks(arguments(shard_set, tmp_path / "run", "train.epochs=1000"), 2, tmp_path / "first") as started:
        wait_for_step(tmp_path / "run", 3, started[0].process)
        for rank in at:
            started[rank].process.send_signal(signal.Signals[name])
        (first, said, error), second = (rank.ended(PROMPT) for rank in started)
    assert (first, error) == (128 + signal.Signals[name], "") and second == (first, "", "")
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    step = load_checkpoint(newest)["cursor"]["step"]
    assert said.endswith(f"stopped after step {step}; the same command with --resume continues exactly there\n")


def test_a_save_that_failed_is_tried_again_in_step(whole: Path, shard_set: Path, tmp_path: Path) -> None:
    """In all processes together, also where they do not wait for the device; the run is the one without a fault."""
    cases = [
        {**case(shard_set, tmp_path / name, "train.async_checkpoints=false"), "full": full, "asynchronous": late}
        for name, full, late in (("now", True, False), ("late", True, True), ("whole late", False, True))
    ]
    results = run(cases, 2, tmp_path / "scratch")
    assert [[rank["status"] for rank in of_ranks] for of_ranks in results] == [[0, 0]] * 3
    same_run(whole, tmp_path / "now")
    same_run(tmp_path / "whole late", tmp_path / "late")
    said = (tmp_path / "scratch" / "printed.0").read_text()
    assert said.count("step_00000002.pt: cannot be written (No space left on device); trying once more, with the") == 2


@pytest.mark.parametrize("policy", [pytest.param("skip", marks=pytest.mark.slow), "rollback"])
def test_what_is_not_finite_in_one_process_is_left_out_in_all(policy: str, shard_set: Path, tmp_path: Path) -> None:
    """In whichever it is, the run is the same; so is the one that was stopped behind it and resumed."""
    settings = [f"train.on_nonfinite={policy}", "train.epochs=1"]
    here, there, again = (
        case(shard_set, tmp_path / name, *settings, nan=nan, stop=stop)
        for name, nan, stop in (
            ("here", [0, 4], None),
            ("there", [1, 4], None),
            ("again", [1, 4], ["step", 1, 5]),
        )
    )
    results = run([here, there, again, resumed(again)], 2, tmp_path / "scratch")
    assert [[rank["status"] for rank in of_ranks] for of_ranks in results] == [[0, 0], [0, 0], [143, 143], [0, 0]]
    assert [[len(rank["samples"]) for rank in of_ranks] for of_ranks in results[:2]] == [[6, 6], [6, 6]]
    same_run(tmp_path / "there", tmp_path / "again")
    without = [line for line in metrics(tmp_path / "here") if line["step"] != 4]  # there it is each one's own loss
    assert without == [line for line in metrics(tmp_path / "there") if line["step"] != 4]
    one, other = (load_checkpoint(tmp_path / name / "checkpoints" / "step_00000006.pt") for name in ("here", "there"))
    assert one["guard"]["bad_steps"] == other["guard"]["bad_steps"] == [4]


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_in_one_process_ends_the_other(failing: int, shard_set: Path, tmp_path: Path) -> None:
    command = [str(failing), "3", *arguments(shard_set, tmp_path / "run")]
    with ranks(command, 2, tmp_path / "output", FAILING) as started:
        status, _, error = started[failing].ended(270 + PROMPT)
        assert status == 1 and "RuntimeError: a fault of this process alone" in error
        status, said, error = started[1 - failing].ended(PROMPT)
    assert status == 2 and error == (
        f"error: process {1 - failing}: another process has ended, and says why itself unless it was killed; continue "
        "from the last checkpoint with --resume\n"
    )
    assert failing == 0 or "step 2" in said


@pytest.mark.slow
def test_a_stopped_process_is_not_waited_for_for_ever(shard_set: Path, tmp_path: Path) -> None:
    """Nor does it hang when it wakes up."""
    settings = ["train.epochs=1000", "train.timeout_seconds=8"]
    with ranks(arguments(shard_set, tmp_path / "run", *settings), 2, tmp_path / "output") as started:
        wait_for_step(tmp_path / "run", 3, started[0].process)
        started[1].process.send_signal(signal.SIGSTOP)
        status, _, error = started[0].ended(8 + PROMPT)
        assert status == 2 and error == (
            "error: process 0: no answer from another process for 8 s (train.timeout_seconds): it hangs, was stopped "
            "or never began; continue from the last checkpoint with --resume\n"
        )
        started[1].process.send_signal(signal.SIGCONT)
        status, _, error = started[1].ended(PROMPT)
        assert status == 2 and error.startswith("error: process 1: another process has ended")


def test_a_process_that_never_comes(shard_set: Path, tmp_path: Path) -> None:
    command = arguments(shard_set, tmp_path / "run", "train.timeout_seconds=2")
    alone = environment(**member(0, 2, 0))
    result = subprocess.run(
        [*TORCHRUN[:1], "-m", "sdpnet.train", *command], env=alone, capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 2 and "error: process 0: no answer from another process for 2 s" in result.stderr


def under_torchrun(command: Sequence[str], *options: str) -> subprocess.Popen[str]:
    torchrun = [*TORCHRUN, "--nproc_per_node=2", *options, "-m", "sdpnet.train", *command]
    return subprocess.Popen(torchrun, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_torchrun_restarts_where_the_run_was(whole: Path, shard_set: Path, tmp_path: Path) -> None:
    """One process is killed; the group starts again by itself and ends as the run to which nothing happened."""
    torchrun = under_torchrun(arguments(shard_set, tmp_path / "run", "train.epochs=2"), "--max-restarts=1")
    wait_for_step(tmp_path / "run", 3, torchrun)
    os.kill(max(children_of(torchrun.pid)), signal.SIGKILL)
    output, _ = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, output
    assert "resumed from " in output
    same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_torchrun_does_not_resume_what_it_has_not_begun(whole: Path, shard_set: Path) -> None:
    """Restarts repeat the refusal."""
    before = metrics(whole)
    torchrun = under_torchrun(arguments(shard_set, whole, "train.epochs=3"), "--max-restarts=2")
    output, _ = torchrun.communicate(timeout=180)
    assert torchrun.returncode != 0
    assert output.count("holds a run already; pass --resume") >= 3 and "resumed from" not in output
    assert metrics(whole) == before


def test_a_run_directory_in_use(shard_set: Path, tmp_path: Path) -> None:
    """Both processes end, and the main one says who holds it."""
    with (
        run_directory(tmp_path / "run") as held,
        ranks(arguments(shard_set, held.path), 2, tmp_path / "output") as started,
    ):
        first, second = (rank.ended(270 + PROMPT) for rank in started)
    assert first[0] == second[0] == 2 and first[1] == second[1] == ""
    line = f"{held.path}: another run (process {os.getpid()} on "
    assert first[2].startswith(f"error: {line}") and first[2].count("\n") == 1
    assert second[2].startswith("error: process 1: another process has ended") and second[2].count("\n") == 1
