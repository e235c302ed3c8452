from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sdpnet import metrics_file
from sdpnet.metrics_file import MetricsFile


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was half written is taken back before the next try."""
    path, lines = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path, lines.append)
    file.append({"step": 1})

    def full(descriptor: int, content: bytes, offset: int) -> None:
        os.pwrite(descriptor, content[:7], offset)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(metrics_file, "write_all", full)
        for step in (2, 3):
            file.append({"step": step})
        assert steps(path) == [1]
    file.append({"step": 4})
    file.append({"step": 5})
    file.close()
    assert steps(path) == [1, 2, 3, 4, 5]
    assert lines == [
        f"{path}: cannot be written (No space left on device); its lines are kept until it can",
        f"{path}: is written again, no line is lost",
    ]


def test_lines_that_are_lost_in_the_end_are_counted(tmp_path: Path) -> None:
    lines: list[str] = []
    file = MetricsFile(tmp_path / "gone" / "metrics.jsonl", lines.append)
    for step in (1, 2):
        file.append({"step": step})
    file.close()
    assert len(lines) == 2 and lines[1].endswith("its last 2 lines could not be written and are lost")


def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, print).keep_up_to(3)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "tra')
    file = MetricsFile(path, print)
    file.keep_up_to(3)
    file.append({"step": 4})
    assert steps(path) == [1, 2, 3, 4]
