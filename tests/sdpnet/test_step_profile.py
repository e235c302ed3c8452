from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpnet.reporting.step_profile import StepProfile

CPU = torch.device("cpu")


def loop(profile: StepProfile, steps: int) -> None:
    """Steps that are told apart by the side of the matrices that they multiply."""
    with profile:
        for step in range(1, steps + 1):
            with profile.mark("forward"):
                torch.mm(torch.ones(step, step), torch.ones(step, step))
            with profile.mark("backward"):
                pass
            profile.step()


def events(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


@pytest.mark.parametrize(("first", "count", "steps"), [(2, 1, 6), (3, 2, 6), (2, 5, 6), (5, 9, 6)])
def test_the_steps_that_were_asked_for(first: int, count: int, steps: int, tmp_path: Path) -> None:
    said: list[str] = []
    loop(StepProfile(tmp_path / "trace.json", (first, count), CPU, said.append), steps)
    recorded = events(tmp_path / "trace.json")
    expected = min(count, steps + 1 - first)
    names = [event["name"] for event in recorded]
    assert names.count("forward") == names.count("backward") == names.count("aten::mm") == expected
    for forward, mm in zip(*([e for e in recorded if e["name"] == n] for n in ("forward", "aten::mm")), strict=True):
        assert forward["ts"] <= mm["ts"] and mm["ts"] + mm["dur"] <= forward["ts"] + forward["dur"]
    assert {f"ProfilerStep#{step - 1}" for step in range(first, first + expected)} <= set(names)
    assert len(said) == 1 and "trace.json" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize("steps", [(0, 0), (9, 3)])
def test_no_step_that_was_asked_for(steps: tuple[int, int], tmp_path: Path) -> None:
    loop(StepProfile(tmp_path / "trace.json", steps, CPU), 4)
    assert list(tmp_path.iterdir()) == []


def test_off_is_no_mark_at_all(tmp_path: Path) -> None:
    with StepProfile(tmp_path / "trace.json", (0, 0), CPU) as off, torch.profiler.profile() as outer:
        with off.mark("forward"):
            torch.ones(1)
        off.step()
    assert "forward" not in {event.key for event in outer.key_averages()}


def test_an_error_in_a_step_leaves_what_was_recorded(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path / "trace.json", (2, 5), CPU)
    with pytest.raises(RuntimeError, match="boom"), profile:
        for step in range(4):
            with profile.mark("forward"):
                if step == 3:
                    raise RuntimeError("boom")
            profile.step()
    assert [event["name"] for event in events(tmp_path / "trace.json")].count("forward") == 3


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    loop(StepProfile(tmp_path / "gone" / "trace.json", (2, 1), CPU, said.append), 6)
    assert len(said) == 1 and "trace.json: cannot be written (No such file or directory" in said[0]
