"""`sdpnet evaluate` from outside: options, mistakes, and the same counts for any number of processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sdpnet import cli
from sdpnet.checkpoint import ModelCard, load_model, save_model
from sdpnet.model import SdPNet, create_model_options

CLASSES = ("ant", "bee", "cow")
TABLE = ["class", "name", "samples", "top1", "top5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose norms have seen no image: what it says of one does not depend on the others."""
    directory = tmp_path_factory.mktemp("model")
    options = create_model_options("sdpnet_tiny", num_classes=5, dim=64, heads=2, patch_size=16)
    torch.manual_seed(1)
    card = ModelCard(options, CLASSES, 64, 0.875, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), {})
    save_model(directory, SdPNet(options), card)
    return directory


def command(model: Path, data: Path, *more: object) -> list[str]:
    fixed = ["evaluate", "--model", str(model), "--data", str(data), "--pipeline", "torchvision", "--device", "cpu"]
    return [*fixed, *map(str, more)]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def by_hand(model: Path, data: Path, size: int, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the validation images: Pillow decodes, torchvision crops, one image at a time."""
    from io import BytesIO

    from PIL import Image
    from torchvision.transforms.v2 import functional as TF

    from pipelines.layout import open_split

    network = load_model(model)[0]
    _, reader = open_split(data, "val")
    logits = []
    for sample in range(reader.num_samples):
        image = Image.open(BytesIO(reader.encoded(sample).tobytes()))
        pixels = TF.pil_to_tensor(image)
        side = round(fraction * min(image.size))
        top, left = round((image.height - side) / 2), round((image.width - side) / 2)
        crop = TF.resized_crop(pixels, top, left, side, side, [size, size], antialias=True)
        with torch.inference_mode():
            logits.append(network(((crop / 255 - 0.5) / 0.25)[None])[0])
    return torch.stack(logits), torch.from_numpy(np.array(reader.labels, np.int64))


@pytest.mark.parametrize(("size", "fraction"), [(None, None), (96, None), (32, 1.0), (128, 0.5)])
def test_resolution_and_crop_at_test_time(
    size: int | None, fraction: float | None, model: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if size is None else ["--image-size", size]
    options += [] if fraction is None else ["--centre-fraction", fraction]
    assert cli.main(command(model, shard_set, "--batch-size", 4, *options)) == 0
    ours = scores(capsys)
    logits, labels = by_hand(model, shard_set, size or 64, fraction or 0.875)
    assert ours["num_samples"] == 10 and ours["top5"] == 1.0
    assert ours["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=2e-3)


def test_averaged_weights_or_those_of_the_last_step(
    model: Path, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose average is another model's weights: it scores as that one."""
    average, card = load_model(model)
    torch.manual_seed(2)
    save_model(tmp_path, SdPNet(card.model), card, ema=average.state_dict())
    told = []
    for directory in (model, tmp_path):
        assert cli.main(command(directory, shard_set)) == 0
        told.append(scores(capsys))
    assert [one.pop("weights") for one in told] == ["raw", "ema"] and told[0] == told[1]
    assert cli.main(command(tmp_path, shard_set, "--weights", "raw")) == 2
    assert "holds averaged weights" in capsys.readouterr().err


def test_half_precision_is_a_choice(model: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for amp in ("fp32", "bf16"):
        assert cli.main(command(model, shard_set, "--amp", amp)) == 0
        losses.append(scores(capsys)["val_loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.fixture(scope="module")
def alone(model: Path, shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    path = tmp_path_factory.mktemp("alone") / "classes.csv"
    assert cli.main(command(model, shard_set, "--batch-size", 10, "--per-class", path)) == 0
    return table(path)


def test_classes_are_scored_one_by_one(model: Path, shard_set: Path, alone: list[dict[str, str]]) -> None:
    logits, labels = by_hand(model, shard_set, 64, 0.875)
    hits = logits.argmax(dim=1) == labels
    assert [row["name"] for row in alone] == list(CLASSES) and list(alone[0]) == TABLE
    for label, row in enumerate(alone):
        of_class = hits[labels == label]
        assert int(row["samples"]) == len(of_class)
        assert float(row["top1"]) == of_class.double().mean().item() and float(row["top5"]) == 1.0


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_several_processes_count_as_one(
    processes: int, batch_size: int, model: Path, shard_set: Path, alone: list[dict[str, str]], tmp_path: Path
) -> None:
    """10 images in global batches of 6: the last one is part padding, and one process has nothing else."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = ["--batch-size", batch_size, "--per-class", tmp_path / "classes.csv"]
    done = subprocess.run(
        [*torchrun, "-m", "sdpnet.cli", *command(model, shard_set, *options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["num_samples"] == 10
    assert table(tmp_path / "classes.csv") == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", 65], "--image-size = 65: must be a multiple of 16"),
        (["--image-size", 0], "--image-size = 0: must be a multiple of 16"),
        (["--centre-fraction", 1.5], "--centre-fraction = 1.5: must be in (0, 1]"),
        (["--batch-size", 0], "--batch-size = 0: must be at least 1"),
        (["--per-class", "nowhere/classes.csv"], "--per-class nowhere/classes.csv: there is no directory nowhere"),
    ],
)
def test_mistakes(
    options: list[object], message: str, model: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(model, shard_set, *options)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
