"""The benchmark of the device stage: that it compares like with like and what it reports, never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sdpnet.pipelines.augment.reference.operations import apply_operations
from sdpnet.pipelines.benchmarks import augment as bench_augment
from sdpnet.pipelines.benchmarks.augment import OPERATIONS
from sdpnet.pipelines.benchmarks.augment_contestants import CLASSES, SEED, PerSample, make_images, race
from sdpnet.pipelines.benchmarks.augment_gpu import min_copy_seconds
from sdpnet.pipelines.planning.policies import Operation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name.lower())
def test_both_sides_of_an_operation_do_the_same(operation: Operation) -> None:
    magnitude, function = OPERATIONS[operation]
    images = make_images(2, 32).permute(0, 3, 1, 2)
    draws = np.full((2, 1), operation, np.uint8), np.full((2, 1), magnitude, np.float32)
    expected = torch.stack([function(image.contiguous()) for image in images])
    difference = (apply_operations(images, *draws).int() - expected.int()).abs()
    assert difference.max() <= (operation == Operation.GAUSSIAN_BLUR)


def test_torchvisions_batches_are_as_ours() -> None:
    images = make_images(4, 32).permute(0, 3, 1, 2).contiguous()
    peer = PerSample(SEED, images, torch.arange(4), CLASSES)
    mixed, targets = peer.mixed(torch.stack([peer.transform(image) for image in images]), peer.labels)
    assert mixed.shape == (4, 3, 32, 32) and mixed.dtype == torch.float32
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert targets.shape == (4, CLASSES) and torch.allclose(targets.sum(1), torch.ones(4))


def test_contestants_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[tuple[str, int]] = []
    contestants = {name: (lambda count, name=name: calls.append((name, count))) for name in "abc"}
    seconds = race(contestants, 2, 5, torch.device("cpu"))  # type: ignore[arg-type]
    assert calls == [(name, 5) for name in "cba" + "abc" + "cba"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_least_time_counts_each_byte_once() -> None:
    images = torch.zeros(2, 10, 10, 3, dtype=torch.uint8)  # 600 bytes in, 1,200 out
    assert min_copy_seconds(images, 900.0) == 2.0


def test_command_reports_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "record.json", torch.get_num_threads()
    arguments = ["--batch", "4", "--size", "16", "--rounds", "2", "--threads", "1", "--json", str(out)]
    assert bench_augment.main(arguments) == 0
    torch.set_num_threads(before)
    record = json.loads(out.read_text())
    names = [row["contestant"] for row in record["stage"]]
    assert names[:3] == ["sdpnet", "sdpnet, increasing", "sdpnet, three"] and record["best_per_sample"] in names[3:]
    for row in [*record["stage"], *(row for rows in record["operations"].values() for row in rows)]:
        assert len(row["ms_per_batch"]) == 2 and 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        if row["contestant"] in (record["best_per_sample"], "torchvision"):
            assert row["median_times_torchvision"] == 1.0
    assert list(record["operations"]) == [operation.name.lower() for operation in OPERATIONS]
    printed = capsys.readouterr().out
    if torch.cuda.is_available():
        assert record["gpu"]["device"] in printed
    else:
        assert record["gpu"].startswith("not measured") and "fused: not measured" in printed


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--batch", "3"), ("--size", "4"), ("--rounds", "0"), ("--threads", "0"), ("--json", "no/dir/f")],
)
def test_wrong_flags_end_in_one_line(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_augment.main([flag, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag}") and error.count("\n") == 1
