"""How long a GPU waits for data, with stand-ins for its stream and events, and on a GPU where one is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trainings import EPOCHS, arguments

from sdpnet.execution.data_wait import DataWait
from sdpnet.execution.side_stream import SideStream
from sdpnet.train import main

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


class FakeGpu:
    """A stream whose work takes the milliseconds that a test says. The host is never late: it queues at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = 0.0  # milliseconds: when the work that is queued so far will be finished
        self.now = 0.0  # how far the device has got
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))

    def record_event(self, event: FakeEvent) -> FakeEvent:
        event.at = self.at
        return event


class FakeEvent:
    at = 0.0

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query(), "torch refuses events that the device has not reached"
        return end.at - self.at


def test_the_idle_time_of_the_stream_counts_when_the_device_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    wait = DataWait(GPU)

    def step(idle: float, busy: float) -> None:
        with wait():
            gpu.at += idle
        gpu.at += busy

    assert wait.read() == 0, "nothing was waited for yet"
    step(10, 90)
    step(0, 100)
    gpu.now = 0
    assert wait.read() == 0, "the device has not finished waiting for the first batch"
    gpu.now = 100
    assert wait.read() == 10 / 100, "from the first wait to the end of the second one, which ended at once"
    assert wait.read() == 10 / 100, "no further wait is finished"
    step(50, 50)
    gpu.now = 300
    assert wait.read() == 50 / 150
    gpu.at = 1000  # an evaluation
    wait.restart()
    step(25, 75)
    step(25, 75)
    gpu.now = 1200
    assert wait.read() == 50 / 125


def test_a_cpu_is_left_to_the_host() -> None:
    wait = DataWait(torch.device("cpu"))
    with wait():
        pass
    wait.restart()
    assert wait.read() is None


def test_a_loader_that_ends_ends_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    for device in (GPU, torch.device("cpu")):
        with pytest.raises(StopIteration), DataWait(device)():
            next(iter(()))


def test_training_reports_what_the_device_waited(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own waiting, which is near 0 or near 1 here, is not what the metrics have."""
    monkeypatch.setattr(DataWait, "read", lambda self: 0.375)
    restarted = []
    monkeypatch.setattr(DataWait, "restart", lambda self: restarted.append(1))
    out = tmp_path / "run"
    assert main(arguments(shard_set, out, "train.device=cpu")) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line} == {0.375}
    assert len(restarted) == EPOCHS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("late", [False, True])
def test_on_a_gpu(late: bool) -> None:
    """A batch that is copied beside a long step costs nothing; one that is made after it costs its time."""
    device, sleep = torch.device("cuda"), 50_000_000  # cycles: 25 ms and more
    wait, side = DataWait(device), SideStream(device)
    for _ in range(4):
        with wait():
            with side():
                torch.cuda._sleep(sleep if late else 1000)
            side.join()
        torch.cuda._sleep(1000 if late else sleep)
        if late:
            torch.cuda.synchronize()  # else the host would take the next batch during this step
    torch.cuda.synchronize()
    fraction = wait.read()
    assert fraction is not None
    assert fraction > 0.8 if late else fraction < 0.2
