"""`sdpnet.reporting.reporter`; tests/preprocess/test_describe.py is about `sdpnet.preprocess.describe`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpnet.distributed.processes import AsyncRead
from sdpnet.reporting.reporter import Clock, GpuGauge, Reporter

TRAINING = {
    "epoch": 0,
    "step": 5,
    "train_loss": 2.5,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "images_per_second": 1234.0,
    "data_wait_fraction": 0.125,
}
EVALUATION = {"epoch": 0, "step": 6, "top1": 0.25, "top5": 0.5, "val_loss": 3.0}
EMA = {"ema_top1": 0.375, "ema_top5": 0.625, "ema_val_loss": 2.0}


class Recorder:
    """A tracker that keeps what it is told."""

    name = "recorder"

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.failed: bool | None = None

    def write(self, metrics: Mapping[str, Any]) -> None:
        self.told.append(dict(metrics))

    def close(self, *, failed: bool) -> None:
        self.failed = failed


class Late(AsyncRead):
    """Values that a device is still to compute: only `read` gets them, and the test sees when."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.reads = 0

    @property
    def ready(self) -> bool:
        return False

    def read(self) -> float:
        self.reads += 1
        return self.value


@pytest.mark.parametrize("next_", ["step", "metrics", "evaluation", "end"])
def test_nobody_waits_for_values_on_their_way(next_: str, tmp_path: Path) -> None:
    path, loss = tmp_path / "metrics.jsonl", Late(2.5)
    with Reporter(path, is_main=True, resumed_step=0) as reporter:
        reporter.training({**TRAINING, "train_loss": loss, "grad_norm": AsyncRead(torch.tensor(0.5))})
        assert not loss.reads and not path.exists()
        if next_ == "step":
            reporter.advance()
        elif next_ == "metrics":
            reporter.training({**TRAINING, "step": 6})
        elif next_ == "evaluation":
            reporter.evaluation(EVALUATION, 10)
        assert loss.reads == (next_ != "end")
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == TRAINING and [line["step"] for line in others] == [6] * (next_ in ("metrics", "evaluation"))


def test_a_failed_device_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Late) -> float:
        raise RuntimeError("the device")

    monkeypatch.setattr(Late, "read", fail)
    metrics = {**TRAINING, "train_loss": Late(2.5)}
    with pytest.raises(KeyError), Reporter(tmp_path / "a", is_main=True, resumed_step=0) as reporter:
        reporter.training(metrics)
        raise KeyError
    with (
        pytest.raises(RuntimeError, match="the device"),
        Reporter(tmp_path / "b", is_main=True, resumed_step=0) as reporter,
    ):
        reporter.training(metrics)


def test_lines_in_the_file_on_the_screen_and_in_trackers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, recorder = tmp_path / "metrics.jsonl", Recorder()
    with Reporter(path, is_main=True, resumed_step=0, trackers=[recorder]) as reporter:
        reporter.begin_epoch(0, 0, 6)
        reporter.advance()
        reporter.training(TRAINING)
        reporter.evaluation(EVALUATION, 10)
        reporter.evaluation({**EVALUATION, **EMA}, 10)
    told = [TRAINING, EVALUATION, {**EVALUATION, **EMA}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == told == recorder.told
    assert recorder.failed is False
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1  step 5  loss 2.5000  lr 1.00e-03  1,234 images/s  waiting for data 12%",
        "epoch 1  step 6  top-1 25.00%  top-5 50.00%  validation loss 3.0000  (10 images)",
        "epoch 1  step 6  top-1 25.00%  top-5 50.00%  validation loss 3.0000  "
        "EMA: top-1 37.50%  top-5 62.50%  validation loss 2.0000  (10 images)",
    ]


def test_a_run_that_fails_tells_its_trackers(tmp_path: Path) -> None:
    recorder = Recorder()
    reporter = Reporter(tmp_path / "metrics.jsonl", is_main=True, resumed_step=0, trackers=[recorder])
    with pytest.raises(KeyError), reporter:
        raise KeyError
    assert recorder.failed is True


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Recorder):
        name = "W&B"

        def write(self, metrics: Mapping[str, Any]) -> None:
            super().write(metrics)
            raise OSError(28, "No space left on device")

    path, failing, recorder = tmp_path / "metrics.jsonl", Failing(), Recorder()
    with Reporter(path, is_main=True, resumed_step=0, trackers=[failing, recorder]) as reporter:
        reporter.training(TRAINING)
        reporter.evaluation(EVALUATION, 10)
    assert failing.told == [TRAINING] and recorder.told == [TRAINING, EVALUATION] and recorder.failed is False
    assert len(path.read_text().splitlines()) == 2
    assert capsys.readouterr().out.count("W&B has failed and gets no more metrics (OSError: ") == 1


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(tmp_path / "metrics.jsonl", is_main=True, resumed_step=0) as reporter:
        reporter.say("a\x1b[2Jb\nc\x9bd \u00e9")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\nc\\x9bd \u00e9\n"


def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(tmp_path / "metrics.jsonl", is_main=False, resumed_step=0) as reporter:
        reporter.training(TRAINING)
        reporter.say("hello")
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "tra')
    Reporter(path, is_main=True, resumed_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_the_clock_counts_what_passed_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("sdpnet.reporting.reporter.time.perf_counter", lambda: now[0])

    def slow() -> Any:
        for batch in range(4):
            now[0] += 0.25
            yield batch

    clock = Clock()
    for _ in clock.timed(slow()):
        now[0] += 0.75
        clock.stepped(32)
    assert clock.read() == {"images_per_second": 32.0, "data_wait_fraction": 0.25, "step_ms": 1000.0}
    now[0] += 1
    assert clock.read() == {"images_per_second": 0.0, "data_wait_fraction": 0.0}


def test_a_gpu_that_does_not_say_its_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GpuGauge(torch.device("cpu")).read() == {}
    asked = []

    def utilization(device: torch.device) -> int:
        asked.append(device)
        if len(asked) == 2:
            raise ModuleNotFoundError("pynvml")
        return 75

    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2_500_000_000)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    gauge = GpuGauge(torch.device("cuda", 1))
    assert gauge.read() == {"gpu_memory_gb": 2.5, "gpu_utilisation": 0.75}
    assert gauge.read() == gauge.read() == {"gpu_memory_gb": 2.5}
    assert asked == [torch.device("cuda", 1)] * 2


def test_a_terminal_gets_one_progress_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name in ("NO_COLOR", "TERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    with Reporter(tmp_path / "metrics.jsonl", is_main=True, resumed_step=0) as reporter:
        reporter.begin_epoch(0, 0, 6)
        reporter.training(TRAINING)
        reporter.evaluation(EVALUATION, 10)
    out = capsys.readouterr().out
    assert "step 5" not in out, "the log line is part of the progress display"
    assert "epoch 1  step 6  top-1 25.00%" in out
