"""The benchmark of `ImageLoader` runs, and its record has what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdpnet.benchmarks import loader_speed


@pytest.mark.usefixtures("native")
def test_a_small_race(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    small = ["--image-size", "32", "--batch-size", "4", "--workers", "1", "--augment", "debug"]
    few = ["--rounds", "2", "--batches", "2", "--epochs", "3"]
    assert loader_speed.main(["--data", str(shard_set), *small, *few, "--json", str(record)]) == 0
    found = json.loads(record.read_text())
    assert set(found["ratios"]) == set(loader_speed.PAIRS) and len(found["memory"]) == 3
    for name, rates in found["crops_per_second"].items():
        assert len(rates["rounds"]) == 2 and rates["min"] <= rates["median"] <= rates["max"], name
    assert all(ratio["seconds"]["median"] > 0 for ratio in found["ratios"].values())
    assert all(epoch["resident"] >= epoch["anonymous"] > 0 for epoch in found["memory"])
    assert "ImageLoader, uint8" in capsys.readouterr().out
    assert loader_speed.main(["--data", str(shard_set), *small, "--batches", "20", *few[:2], "--epochs", "1"]) == 0, (
        "views are left out where an epoch is too short"
    )
    assert loader_speed.main(["--data", str(shard_set), "--rounds", "0"]) == 2
