from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_batches import loader_for
from torch import nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional import accuracy

from sdpnet.config.load import load_config
from sdpnet.distributed.processes import Processes
from sdpnet.model.sdpnet import create_model
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.options import AugmentOptions, ShardOptions
from sdpnet.training.evaluate import evaluate, write_per_class

ALONE = Processes(ShardOptions(), torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 3, 10, 16])
def test_scores_equal_torchmetrics_on_each_sample_once(batch_size: int, shard_set: Path) -> None:
    settings = [f"data.path={shard_set}", "data.pipeline=torchvision", "data.num_workers=1"]
    config = load_config("debug", [*settings, f"data.batch_size_per_gpu={batch_size}"])
    loader = loader_for(config, "val")
    stage = DeviceStage(AugmentOptions(), 9, torch.float32, train=False)
    torch.manual_seed(0)
    model = create_model("sdpnet_tiny", 9)
    scores = evaluate(model, loader, stage, ALONE)
    assert scores is not None and scores.num_samples == 10

    logits, labels = [], []
    for batch in loader.batches():
        with torch.inference_mode():
            logits.append(model(stage(batch)[0])[batch.valid])
        labels.append(batch.labels[batch.valid])
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    assert len(all_labels) == 10
    for top, ours in ((1, scores.top1), (5, scores.top5)):
        theirs = accuracy(all_logits, all_labels, task="multiclass", num_classes=9, top_k=top, average="micro")
        assert ours == pytest.approx(theirs.item(), abs=1e-6)
    samples = np.bincount(all_labels, minlength=9)
    assert scores.counts[:, 0].tolist() == samples.tolist() == [4, 3, 3, 0, 0, 0, 0, 0, 0]
    for top, column in ((1, 1), (5, 2)):
        by_class = MulticlassAccuracy(9, top_k=top, average=None)(all_logits, all_labels)
        assert scores.counts[:3, column] / samples[:3] == pytest.approx(by_class[:3].numpy())
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(all_logits, all_labels).item(), rel=1e-5)


class OneBatch:
    """A loader of one batch whose padding would be wrong to score."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def batches(self) -> Iterator[Batch]:
        yield self.batch


@pytest.mark.parametrize("right", [True, False])
def test_padding_is_never_scored(right: bool, shard_set: Path) -> None:
    """The model is right about all images but the padding, or about none but the padding."""
    config = load_config("debug", [f"data.path={shard_set}", "data.pipeline=torchvision", "data.batch_size_per_gpu=4"])
    batch = list(loader_for(config, "val").batches())[-1]
    assert batch.valid.tolist() == [True, True, False, False]

    class SaysTheLabels(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            wrong = (batch.labels + 1) % 3
            return nn.functional.one_hot(torch.where(batch.valid == right, batch.labels, wrong), 3).float() * 10

    scores = evaluate(
        SaysTheLabels(),
        OneBatch(batch),  # type: ignore[arg-type]
        DeviceStage(AugmentOptions(), 3, torch.float32, train=False),
        ALONE,
    )
    assert scores is not None and scores.top1 == right and scores.num_samples == 2
    assert scores.counts.sum(axis=0).tolist() == [2, 2 * right, 2]


def test_a_loss_that_is_not_finite_counts_only_where_the_sample_does(shard_set: Path) -> None:
    config = load_config("debug", [f"data.path={shard_set}", "data.pipeline=torchvision", "data.batch_size_per_gpu=4"])
    batch = list(loader_for(config, "val").batches())[-1]

    class InfiniteWhereInvalid(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.where(batch.valid.view(-1, 1), 0.0, torch.nan).expand(-1, 3)

    loader = OneBatch(batch)
    stage = DeviceStage(AugmentOptions(), 3, torch.float32, train=False)
    scores = evaluate(InfiniteWhereInvalid(), loader, stage, ALONE)  # type: ignore[arg-type]
    assert scores is not None and scores.loss == pytest.approx(np.log(3))


def test_the_table_of_classes(tmp_path: Path) -> None:
    counts = np.array([[3, 1, 2], [0, 0, 0], [7, 7, 7], [0, 0, 0]])
    write_per_class(tmp_path / "classes.csv", ["=1+1", "\ud800\x1b[2J", "n\n"], counts)
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["'=1+1", "\\ud800\\x1b[2J", "n\\n"]
    write_per_class(tmp_path / "classes.csv", ["tench, or doctor fish", '"quoted"', "ümlaut"], counts)
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [["class", "name", "samples", "top1", "top5"]] * 3
    assert [row["name"] for row in rows] == ["tench, or doctor fish", '"quoted"', "ümlaut"]
    assert [(row["class"], row["samples"], row["top1"], row["top5"]) for row in rows] == [
        ("0", "3", repr(1 / 3), repr(2 / 3)),
        ("1", "0", "", ""),
        ("2", "7", "1.0", "1.0"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["classes.csv"]


def test_an_interruption_gives_no_scores(shard_set: Path) -> None:
    config = load_config("debug", [f"data.path={shard_set}", "data.pipeline=synthetic", "data.batch_size_per_gpu=4"])
    loader = loader_for(config, "val")
    stage = DeviceStage(AugmentOptions(), 3, torch.float32, train=False)
    assert evaluate(create_model("sdpnet_tiny", 3), loader, stage, ALONE, lambda: True) is None
