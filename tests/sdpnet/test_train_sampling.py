"""`train` with `data.sampling`: the samples of both splits, and what a run can be continued with."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trainings import arguments, same_run, stop_after

from sdpnet.checkpoints.model import load_model
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.train import main

SAMPLING = ("data.sampling.exclude=[bee]", "data.sampling.weights=balanced", "data.sampling.repeats=2")


def scored(run: Path) -> dict[str, int]:
    with (run / "per_class.csv").open() as file:
        return {row["name"]: int(row["samples"]) for row in csv.DictReader(file)}


def test_a_stopped_run_with_sampling_continues_exactly(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(shard_set, tmp_path / "whole", *SAMPLING)) == 0
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert main(arguments(shard_set, tmp_path / "run", *SAMPLING)) == 130
    assert main(["--resume", "--out", str(tmp_path / "run")]) == 0
    same_run(tmp_path / "whole", tmp_path / "run")
    counts = scored(tmp_path / "run")
    assert counts["bee"] == 0 and counts["ant"] > 0 and counts["cow"] > 0, "classes also choose what is evaluated"


def test_another_sampling_is_refused_by_name(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        assert main(arguments(shard_set, tmp_path / "run")) == 130
    capsys.readouterr()
    assert main(["--resume", "--out", str(tmp_path / "run"), "--set", "data.sampling.weights=balanced"]) == 2
    error = capsys.readouterr().err
    assert "with data.sampling every sample once, not weights = balanced" in error and error.count("\n") == 1


def test_labels_of_ones_own_train_other_classes(shard_set: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        labels = open_split(shard_set, split)[1].labels
        np.save(tmp_path / f"{split}.npy", np.where(labels == 1, 0, 1))
    keys = [f"data.sampling.labels={tmp_path}/train.npy", f"data.sampling.val_labels={tmp_path}/val.npy"]
    assert main(arguments(shard_set, tmp_path / "run", *keys, "train.epochs=1")) == 0
    _, card = load_model(tmp_path / "run")
    assert card.model.num_classes == 2 and card.classes == ("0", "1")
    assert set(scored(tmp_path / "run")) == {"0", "1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda tmp: [f"data.sampling.labels={tmp}/rows.npy", f"data.sampling.val_labels={tmp}/rows_val.npy"], "rows"),
        (lambda tmp: [f"data.sampling.labels={tmp}/ints.npy"], "give data.sampling.val_labels, too"),
        (lambda tmp: [f"data.sampling.labels={tmp}/none.npy"], "data.sampling.labels: "),
        (lambda tmp: ["data.sampling.classes=[bea]"], "data.sampling.classes: no class 'bea': did you mean 'bee'?"),
        (lambda tmp: ["data.sampling.subset=0.01"], "fewer than one batch"),
    ],
    ids=["rows", "one split", "missing", "class", "too few"],
)
def test_wrong_use_ends_in_one_line(
    settings: Callable[[Path], list[str]],
    message: str,
    shard_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for split, suffix in (("train", ""), ("val", "_val")):
        count = open_split(shard_set, split)[1].num_samples
        np.save(tmp_path / f"rows{suffix}.npy", np.zeros((count, 2)))
        np.save(tmp_path / f"ints{suffix}.npy", np.zeros(count, int))
    assert main(arguments(shard_set, tmp_path / "run", *settings(tmp_path))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
