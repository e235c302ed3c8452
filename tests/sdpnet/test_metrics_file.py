from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sdpnet.pipelines.errors import UserError
from sdpnet.reporting import metrics_file
from sdpnet.reporting.metrics_file import MetricsFile, metrics_line


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
        f"{path}: cannot be written (No space left on device); new lines wait in memory",
        f"{path}: can be written again; no line is lost",
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


def test_each_step_has_one_line_of_training_and_one_of_evaluation(tmp_path: Path) -> None:
    """Also where an earlier version has repeated one. The last one counts."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "train_loss": 2}, {"step": 1, "top1": 0.25}, {"step": 1, "top1": 0.5}]
    lines += [{"step": 2, "train_loss": 1}, {"step": 2, "top1": 0.75, "ema_top1": 0.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsFile(path, print).keep_up_to(2)
    assert read(path) == [lines[0], *lines[2:]]
    MetricsFile(path, print).keep_up_to(2, evaluated=False)
    assert read(path) == [lines[0], *lines[2:4]]
    MetricsFile(path, print).keep_up_to(1)
    assert read(path) == [lines[0], lines[2]]


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "step",
    ["1" + "0" * 400, "1" + "0" * 5000, "[" * 100_000 + "]" * 100_000, "NaN", "-1", "1e308", "null", "{}", '"x"'],
)
def test_steps_that_are_none(step: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": {step}, "top1": 1}}\n{{"step": 1}}\n')
    assert metrics_line(path.read_text().splitlines()[0]) is None
    MetricsFile(path, print).keep_up_to(5)
    assert steps(path) == [1]


def test_what_is_no_file_of_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not a file"):
        MetricsFile(path, print).keep_up_to(5)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes are too many"):
        MetricsFile(path, print).keep_up_to(5)


def test_nothing_is_written_into_another_runs_directory(tmp_path: Path) -> None:
    said: list[str] = []

    def refuse() -> None:
        raise OSError(116, "the run's folder was replaced by another one")

    file = MetricsFile(tmp_path / "metrics.jsonl", said.append, refuse)
    file.append({"step": 1})
    file.close()
    assert not list(tmp_path.iterdir())
    assert "cannot be written (the run's folder was replaced by another one)" in said[0] and len(said) == 2
