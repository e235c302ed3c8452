"""`sdpnet evaluate` from outside: options, mistakes, and the same counts for any number of processes."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launches import TORCHRUN
from torch.nn import functional as F

from sdpnet import cli
from sdpnet.checkpoints.model import ModelCard, load_model, save_model
from sdpnet.commands.evaluate import table
from sdpnet.model.sdpnet import SdPNet, create_model_options
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.terminal.readable_names import readable_names
from sdpnet.training.evaluate import Scores, write_per_class

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


def per_class(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scored(capsys: pytest.CaptureFixture[str], model: Path, data: Path, *more: object) -> dict[str, Any]:
    assert cli.main(command(model, data, "--json", *more)) == 0
    return json.loads(capsys.readouterr().out)


def by_hand(model: Path, data: Path, size: int, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the validation images: Pillow decodes, torchvision crops, one image at a time."""
    from io import BytesIO

    from PIL import Image
    from torchvision.transforms.v2 import functional as TF

    from sdpnet.pipelines.shards.layout import open_split

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
    ours = scored(capsys, model, shard_set, "--batch-size", 4, *options)
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
    told = [scored(capsys, directory, shard_set) for directory in (model, tmp_path)]
    assert [one.pop("weights") for one in told] == ["raw", "ema"] and told[0] == told[1]
    assert cli.main(command(tmp_path, shard_set, "--weights", "raw")) == 2
    assert "holds averaged weights" in capsys.readouterr().err


def test_half_precision_is_a_choice(model: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [scored(capsys, model, shard_set, "--amp", amp)["val_loss"] for amp in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.fixture(scope="module")
def alone(model: Path, shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    path = tmp_path_factory.mktemp("alone") / "classes.csv"
    assert cli.main(command(model, shard_set, "--batch-size", 10, "--per-class", path)) == 0
    return per_class(path)


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
    torchrun = [*TORCHRUN, f"--nproc_per_node={processes}"]
    options = ["--batch-size", batch_size, "--per-class", tmp_path / "classes.csv", "--json"]
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
    assert per_class(tmp_path / "classes.csv") == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", 65], "--image-size = 65: must be a multiple of 16"),
        (["--image-size", 0], "--image-size = 0: must be a multiple of 16"),
        (["--centre-fraction", 1.5], "--centre-fraction = 1.5: must be in (0, 1]"),
        (["--batch-size", 0], "--batch-size = 0: must be at least 1"),
        (["--per-class", "nowhere/c.csv"], "--per-class nowhere/c.csv: the directory nowhere does not exist; make it"),
        (["--device", "cuda"], "--device cuda: there is no usable GPU here; take --device cpu or auto"),
        (["--per-class", "."], "--per-class .: is a directory; give the name of a file"),
    ],
)
def test_mistakes(
    options: list[object],
    message: str,
    model: Path,
    shard_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(command(model, shard_set, *options)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_table_for_people(
    model: Path, shard_set: Path, alone: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = scored(capsys, model, shard_set)
    assert cli.main(command(model, shard_set)) == 0
    *lines, following = capsys.readouterr().out.splitlines()
    assert following.startswith("next: ") and " export --model " in following
    assert lines == [
        "images   10",
        f"top-1    {facts['top1']:.2%}",
        "top-5    100.00%",
        f"loss     {facts['val_loss']:.4f}",
        "weights  of the last step",
    ]
    assert cli.main(command(model, shard_set, "--per-class", tmp_path / "classes.csv")) == 0
    *more, _ = capsys.readouterr().out.splitlines()
    assert more[:6] == [*lines, "classes with the lowest top-1, of 3:"]
    expected = sorted(alone, key=lambda row: float(row["top1"]))
    assert more[6:] == [f"{float(row['top1']):8.2%} of {row['samples']}  {row['name']}" for row in expected]


def test_scores_are_said_before_the_table_of_classes_fails(
    model: Path, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    out = tmp_path / "classes.csv"
    assert cli.main(command(model, shard_set, "--per-class", out, "--json")) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["num_samples"] == 10
    assert said.err == f"error: {out}: No space left on device\n" and not list(tmp_path.iterdir())


def test_synsets_have_words_for_people(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    counts = np.array([[2, 1, 2], [4, 1, 2], [0, 0, 0]])
    classes = ("n01440764", "n02012849", "n03126707")
    names = readable_names(classes)
    lines = table(Scores(1 / 3, 2 / 3, 1.0, 6, counts), "ema", names)
    assert lines[4:] == [
        "weights  averaged",
        "classes with the lowest top-1, of 2:",
        "  25.00% of 4  crane (n02012849)",
        "  50.00% of 2  tench",
    ]
    write_per_class(tmp_path / "classes.csv", classes, counts)
    rows = per_class(tmp_path / "classes.csv")
    assert list(rows[0]) == [*TABLE, "words"]
    assert [(row["name"], row["words"]) for row in rows][:2] == [
        ("n01440764", "tench"),
        ("n02012849", "crane (n02012849)"),
    ]


def test_images_turned_otherwise_are_noted(
    model: Path, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, card = load_model(model)
    save_model(tmp_path, network, replace(card, preprocessing=Preprocessing("apply", 500)))
    scored(capsys, model, shard_set)
    assert cli.main(command(tmp_path, shard_set)) == 0
    said = capsys.readouterr().err
    assert "was made with --exif ignore" in said and "trained on images made with --exif apply" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_stdout_is_one_line(
    model: Path, shard_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(command(model, shard_set)) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


def test_other_classes_are_refused_with_the_first_difference(
    model: Path, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, card = load_model(model)
    save_model(tmp_path, network, replace(card, classes=("ant", "bug", "cow")))
    assert cli.main(command(tmp_path, shard_set)) == 2
    message = f"error: {tmp_path}: was trained on other classes than those of {shard_set}: class 1 is 'bug' there and"
    assert capsys.readouterr().err.startswith(message)
