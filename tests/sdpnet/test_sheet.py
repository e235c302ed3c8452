from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_batches import loader_for

from sdpnet import cli
from sdpnet.commands.sheet import augmented_batch, describe, draw
from sdpnet.config.load import load_config
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.plan import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, BatchPlan
from sdpnet.pipelines.planning.policies import Operation

SIZES = np.array([[375, 500], [100, 40], [64, 64], [64, 64]], np.int32)
NAMES = ("tench", "bee", "cow", "ant")


def settings(shards: Path, *more: str) -> list[str]:
    fixed = [f"data.path={shards}", "data.pipeline=torchvision", "data.num_workers=1", "data.batch_size_per_gpu=8"]
    return [*fixed, *more]


def command(shards: Path, out: Path, *more: str) -> list[str]:
    keys = [word for setting in settings(shards) for word in ("--set", setting)]
    return ["sheet", "--config", "debug", *keys, "--out", str(out), *more]


def plan_of(operations: Sequence[Sequence[tuple[Operation, float]]] = ((), (), (), ())) -> BatchPlan:
    """A plan of four samples: CutMix and MixUp with each other, erased, and one with nothing but a crop."""
    return BatchPlan(
        sample_ids=np.array([70, 71, 5, 900]),
        valid=np.array([True, True, True, False]),
        crop_boxes=np.array([[75, 50, 150, 250], [0, 0, 100, 40], [32, 0, 32, 64], [0, 0, 64, 64]], np.int32),
        flips=np.array([True, False, False, False]),
        ops=np.array([[op for op, _ in of_one] for of_one in operations], np.uint8),
        magnitudes=np.array([[m for _, m in of_one] for of_one in operations], np.float32),
        erase_boxes=np.array([[0, 0, 0, 0], [0, 0, 0, 0], [3, 40, 10, 20], [0, 0, 0, 0]], np.int32),
        erase_keys=np.zeros(4, np.int64),
        mix_kinds=np.array([MIX_CUTMIX, MIX_MIXUP, MIX_NONE, MIX_NONE], np.uint8),
        mix_partners=np.array([1, 0, 3, 2]),
        mix_lambdas=np.array([0.75, 0.3, 1, 1], np.float32),
        mix_boxes=np.array([[8, 16, 32, 24], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.int32),
    )


def test_describe_says_all_that_the_plan_decided() -> None:
    operations = [
        [(Operation.ROTATE, -9), (Operation.COLOUR, 0.27)],
        [(Operation.TRANSLATE_X, 30), (Operation.SOLARIZE, 178.5)],
        [(Operation.IDENTITY, 0), (Operation.SHEAR_Y, 0.09)],
        [(Operation.GAUSSIAN_BLUR, 1.25), (Operation.SOLARIZE_ADD, 99)],
    ]
    plan = plan_of(operations)
    assert [describe(plan, i, SIZES, NAMES) for i in range(4)] == [
        [
            "#70 tench 75% + bee 25%",
            "crop x 10-60%, y 20-60%: 20% of 500x375",
            "flip",
            "rotate -9.0 deg",
            "colour times 1.27",
            "CutMix with #71, lambda 0.75",
            "its 24x32 px at x 16, y 8",
        ],
        [
            "#71 bee 30% + tench 70%",
            "crop x 0-100%, y 0-100%: 100% of 40x100",
            "translate x +30.0 px",
            "solarize from level 178.5",
            "MixUp with #70, lambda 0.30",
        ],
        [
            "#5 cow",
            "crop x 0-100%, y 50-100%: 50% of 64x64",
            "identity",
            "shear y +0.090 rows a column",
            "erase 20x10 px at x 40, y 3",
        ],
        [
            "#900 ant",
            "not decoded, not trained on",
            "crop x 0-100%, y 0-100%: 100% of 64x64",
            "blur, sigma 1.25 px",
            "solarize-add 99 levels below 128",
        ],
    ]


def test_every_operation_has_words_of_its_own() -> None:
    described = [describe(plan_of([[(op, 0.5)]] * 4), 2, SIZES, NAMES)[2] for op in Operation]
    assert len(set(described)) == len(Operation)
    for operation, words in zip(Operation, described, strict=True):
        stem = operation.name.lower().removeprefix("gaussian_").replace("_", " ")
        assert words.replace("-", " ").startswith(stem)


@pytest.mark.parametrize("policy", ["none", "randaugment", "increasing", "three"])
def test_the_images_are_what_the_model_gets(shard_set: Path, policy: str) -> None:
    config = load_config("debug", settings(shard_set, f"augment.randaugment.policy={policy}", "seed=3"))
    images, lines = augmented_batch(config, 2, 1)
    loader = loader_for(config, "train")
    batch = list(loader.batches(2))[1]
    expected, targets = DeviceStage(config.augment, 3, torch.float32, train=True)(batch)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.augment.mean, config.augment.std))
    pixels = ((expected * std + mean) * 255).permute(0, 2, 3, 1).numpy()
    assert images.shape == (8, 64, 64, 3) and images.dtype == np.uint8
    assert np.abs(images - pixels).max() < 0.51
    for sample, target, of_one in zip(batch.sample_ids.tolist(), targets.numpy(), lines, strict=True):
        number, *words = of_one[0].split()
        weights = np.zeros(3)
        for name, weight in zip(words[::3], words[1::3], strict=True):
            weights[loader.manifest.classes.index(name)] += float(weight.removesuffix("%")) / 100
        assert number == f"#{sample}"
        assert weights == pytest.approx(target, abs=0.011)


def test_an_image_without_mixing_has_one_class_and_no_share(shard_set: Path) -> None:
    off = ("augment.mix.mixup_alpha=0", "augment.mix.cutmix_alpha=0")
    _, lines = augmented_batch(load_config("debug", settings(shard_set, *off)), 0, 0)
    assert all(of_one[0].split()[1:] in (["ant"], ["bee"], ["cow"]) for of_one in lines)


@pytest.mark.parametrize(("count", "side", "columns", "shown"), [(1, 32, 1, 224), (5, 224, 4, 224), (40, 300, 6, 300)])
def test_every_image_is_on_the_sheet_and_text_below_it(count: int, side: int, columns: int, shown: int) -> None:
    images = np.random.default_rng(0).integers(1, 255, (count, side, side, 3), dtype=np.uint8)
    sheet = np.asarray(draw("a heading", images, [["#1 bee", "flip"]] * count))
    cell = max(240, shown)
    assert sheet.shape[1] == 10 + columns * (cell + 10)
    top = None
    for i, image in enumerate(images):
        enlarged = image.repeat(shown // side, axis=0).repeat(shown // side, axis=1)
        left = 10 + i % columns * (cell + 10)
        starts = np.flatnonzero((sheet[: len(sheet) - shown + 1, left : left + shown] == enlarged[0]).all((1, 2)))
        (top,) = [start for start in starts if (sheet[start : start + shown, left : left + shown] == enlarged).all()]
        below = sheet[top + shown : top + shown + 40, left : left + cell]
        assert (below == 0).any() and (below == 255).any()
        assert (below[..., :1] == below).all()  # grey: no other image lies on it
    assert top is not None and (sheet[: top - 10] < 255).any()


def test_long_and_foreign_names_are_wrapped_within_their_cell() -> None:
    images = np.zeros((2, 224, 224, 3), np.uint8)
    short = draw("", images, [["#1 bee"], ["#2 bee"]])
    long = draw("", images, [["#1 " + "w" * 300 + " \n蜂"], ["#2 bee"]])
    assert long.width == short.width and long.height >= short.height + 60
    gap = np.asarray(long)[:, 250:260]
    assert (gap[300:] == 255).all()


def test_the_command_writes_the_same_file_each_time(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.PNG"]
    for file, more in zip(files, ([], [], ["--epoch", "1"]), strict=True):
        assert cli.main([*command(shard_set, file), "--batch", "2", "--count", "6", *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [str(file) for file in files] and all(line.startswith("next: ") for line in lines[1::2])
    first, second, other = (file.read_bytes() for file in files)
    assert first == second != other
    with Image.open(BytesIO(first), formats=["PNG"]) as image:
        assert image.mode == "RGB" and image.width == 10 + 4 * 250 and image.height > 2 * 192
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_a_batch_smaller_than_the_usual_sheet_is_shown_whole(shard_set: Path, tmp_path: Path) -> None:
    whole, same = tmp_path / "whole.png", tmp_path / "same.png"
    assert cli.main(command(shard_set, whole)) == 0
    assert cli.main(command(shard_set, same, "--count", "8")) == 0
    assert whole.read_bytes() == same.read_bytes()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--set", "data.path=''"], "no shard set given: pass --data SHARDS"),
        (["--count", "9"], "--count = 9: must be 1 to data.batch_size_per_gpu (8)"),
        (["--count", "0"], "--count = 0: must be 1 to"),
        (["--batch", "3"], "--batch = 3: must be 0 to 2"),
        (["--batch", "-1"], "--batch = -1"),
        (["--epoch", "-1"], "--epoch = -1: must be 0 or more"),
        (["--out", "sheet.jpg"], "sheet.jpg': must be the name of a .png file"),
        (["--out", "/proc/sheet.png"], "/proc/"),
        (["--config", "debugg"], "did you mean 'debug'"),
        (["--set", "augment.randaugment.policy=trivial"], "augment.randaugment.policy"),
        (["--set", "data.batch_size_per_gpu=100"], "lower the batch size"),
    ],
)
def test_mistakes_end_in_one_line(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert cli.main(command(shard_set, tmp_path / "sheet.png", *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not list(tmp_path.iterdir())
