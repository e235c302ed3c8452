"""The recipes of `configs/` for small images: each trains for some steps, and says what it is."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from trainings import metrics

from sdpnet.config.load import dump_config, load_config
from sdpnet.config.names import CONFIG_DIRECTORY
from sdpnet.config.options import Config
from sdpnet.config.resolution import image_size_of
from sdpnet.gpu_checks.programs import accuracy
from sdpnet.gpu_checks.programs.accuracy import SETS, is_of_a_set, parse_recipes
from sdpnet.lab.compute import training_macs
from sdpnet.lab.experiment import Experiment
from sdpnet.lab.variants import read_variants
from sdpnet.model.sdpnet import SdPNet
from sdpnet.pipelines.errors import UserError
from sdpnet.train import main

TINY = [f"tiny_imagenet/{path.stem}" for path in sorted((CONFIG_DIRECTORY / "tiny_imagenet").glob("*.yaml"))]
GPU = [name for name in TINY if "cpu" not in name]
# Everything of a recipe but its depth, its width and its length.
SMALL = ["model.conv_blocks=1", "model.transformer_blocks=1", "model.dim=32", "model.heads=4", "model.head_hidden=32"]
SMALL += ["data.batch_size_per_gpu=4", "data.num_workers=1", "data.pipeline=torchvision", "train.log_interval=1"]
SHORT = ["train.epochs=2", "optim.warmup_epochs=1", "optim.restart_epochs=1", "train.eval_interval=2"]


@pytest.mark.parametrize("name", [*TINY, "cifar10_gpu"])
def test_it_trains(name: str, shard_set: Path, tmp_path: Path) -> None:
    config = load_config(name)
    growing = ["resolution.end_epoch=1"] if config.resolution.start_size else []
    full = ["train.full_patch_epochs=1"] if config.train.full_patch_epochs else []
    settings = [*SMALL, *SHORT, *growing, *full, f"data.path={shard_set}"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["--config", name, "--out", str(tmp_path), *words]) == 0
    lines = metrics(tmp_path)
    assert sum("train_loss" in line for line in lines) == 12
    assert ("ema_top1" in lines[-1]) == (config.ema.decay > 0)


@pytest.mark.parametrize("name", [*TINY, "cifar10_gpu"])
def test_it_says_what_it_reaches_and_its_arithmetic(name: str) -> None:
    comment = [line for line in (CONFIG_DIRECTORY / f"{name}.yaml").read_text().splitlines() if line.startswith("# ")]
    text = " ".join(line[2:] for line in comment)
    assert "Not measured yet" in text or "records/" in text
    assert "Arithmetic: " in text
    config, num_classes, images = load_config(name), 200, 100_000
    if name == "cifar10_gpu":
        num_classes, images = 10, 50_000
    if "cpu" not in name:
        petaflop = 2 * training_macs(config, num_classes) * images / 1e15
        assert f" {petaflop:.0f} PFLOP" in text or f" {petaflop:.1f} PFLOP" in text
    with torch.device("meta"):
        model = SdPNet(config.model.options(num_classes))
    low, high = (0.1e6, 0.2e6) if "cpu" in name else (3e6, 4e6) if name == "cifar10_gpu" else (20e6, 25e6)
    assert low < model.num_parameters < high


def test_the_fast_recipes_are_one_curve() -> None:
    """Of one model: 16, 40 and 100 epochs, the 40 at a little more than 0.35 of the operations of the 100."""
    configs = {epochs: load_config(f"tiny_imagenet/fast{epochs}") for epochs in (16, 40, 100)}
    cost = {epochs: training_macs(config, 200) for epochs, config in configs.items()}
    assert cost[40] / cost[100] == pytest.approx(0.4, abs=0.02) and cost[16] / cost[100] < 0.17
    assert training_macs(load_config("tiny_imagenet/modern"), 200) / cost[100] > 1.6
    for epochs, config in configs.items():
        sizes = [image_size_of(epoch, config.resolution, config.data.image_size) for epoch in range(epochs)]
        assert sizes[0] == 32 and sizes[-1] == 56 and set(sizes) == {32, 48, 56} and config.data.image_size == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["resolution.end_size=72"], r"resolution\.end_size = 72: must be a multiple of the patch size 8, at most"),
        (["resolution.end_size=60"], r"resolution\.end_size = 60: must be a multiple of the patch size 8"),
        (["resolution.end_size=-8"], r"resolution\.end_size = -8: must be 0 \(data\.image_size\) or more"),
        (["resolution.start_size=48", "resolution.end_size=32"], r"resolution\.start_size = 48: must be at most 32 px"),
    ],
)
def test_wrong_final_sizes(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("demo", ["resolution.multiple=16", *settings])


def test_a_final_size_without_growing_is_that_of_all_epochs() -> None:
    config = load_config("demo", ["resolution.end_size=48"])
    assert {image_size_of(epoch, config.resolution, 64) for epoch in range(20)} == {48}


# ---- on a GPU, in the order of what they are worth


def test_a_set_of_recipes_by_the_name_of_its_folder(shard_set: Path) -> None:
    recipes = parse_recipes(f"tiny_imagenet={shard_set},cifar10_gpu={shard_set}")
    assert list(recipes) == [*(f"tiny_imagenet/{name}" for name in SETS["tiny_imagenet"]), "cifar10_gpu"]
    assert sorted(name for name in recipes if is_of_a_set(name)) == sorted(GPU)
    assert set(recipes.values()) == {shard_set}


def test_they_take_their_own_epochs_or_what_fits(
    native: None, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for training, at an epoch of one second; the images come as two archives."""
    packs = tmp_path / "packs"
    packs.mkdir()
    for number in range(2):
        with tarfile.open(packs / f"tiny-{number}.tar.xz", "w:xz") as archive:
            for path in sorted(path for path in image_folder.rglob("*") if path.is_file())[number::2]:
                archive.add(path, path.relative_to(image_folder))
    trained: list[tuple[str, dict[str, str]]] = []
    clock = [0.0]

    def train(recipe: str, data: Path, out: Path, more: list[str], device: str) -> object:
        settings = dict(setting.split("=", 1) for setting in more)
        load_config(recipe, more)
        assert (data / "manifest.json").is_file()
        trained.append((f"{recipe}, {out.name}", settings))
        epochs = int(settings["train.epochs"])
        clock[0] += epochs
        lines = [{"epoch": epoch, "step_ms": 1000.0} for epoch in range(epochs)] + [{"epoch": epochs, "top1": 0.5}]
        return lines, float(epochs)

    monkeypatch.setattr(accuracy, "_train", train)
    monkeypatch.setattr(accuracy.time, "perf_counter", lambda: clock[0])
    words = ["--recipes", f"tiny_imagenet={packs}", "--seconds", "100", "--work", str(tmp_path / "work")]
    assert accuracy.main([*words, "--json", str(tmp_path / "out.json")]) == 0
    runs = [(name, settings) for name, settings in trained if name.endswith(", run")]
    assert [(name, settings["train.epochs"]) for name, settings in runs[:2]] == [
        ("tiny_imagenet/fast40, run", "40"),
        ("tiny_imagenet/patch4, run", "30"),
    ]
    assert 2 <= int(runs[2][1]["train.epochs"]) < 40 and runs[2][0].startswith("tiny_imagenet/modern")
    assert runs[1][1]["resolution.end_epoch"] == "20" and runs[1][1]["train.full_patch_epochs"] == "4"
    assert '"not_measured"' in (tmp_path / "out.json").read_text() and not (tmp_path / "work").exists()


def configs_of(switches: str, baseline: str) -> dict[str, Config]:
    """The configs of the file of variants in `examples`, which all differ."""
    variants = read_variants(Path(__file__).parents[2] / "examples" / switches)
    experiment = Experiment(f"tiny_imagenet/{baseline}", "/data", (), baseline, variants=tuple(variants), rounds=3)
    configs = experiment.configs(200)
    assert len(configs) == len(variants) + 1 == len({dump_config(config) for config in configs.values()})
    return configs


def test_the_switches_to_compare_are_valid() -> None:
    assert len(configs_of("modern_switches.yaml", "cpu_modern")) == 14
    configs = configs_of("recipe_switches.yaml", "cpu_seed")
    epochs = {name: config.train.epochs for name, config in configs.items()}
    assert epochs["growing images"] > 20 and epochs["conv stem"] < epochs["cpu_seed"] == 16


def test_the_documents_have_the_figures_of_the_run_on_a_gpu() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "records/2026-11-28-h200-tiny-imagenet.json").read_text())
    page = (root / "docs/benchmarks/recipes.md").read_text()
    for row in record["scores"]:
        figures = f"{100 * row['top1']:.2f} | {100 * row['ema_top1']:.2f}"
        assert f"| {row['epoch']} | {row['seconds_of_steps']} | {figures} |\n" in page
    for row in record["rates"]["by_image_size"]:
        rate = row["images_per_second"]
        line = f"{rate['median']:,} ({rate['p10']:,} to {rate['p90']:,}) at {row['image_size']} px"
        assert line in " ".join(page.split())
        assert row["step_ms"]["median"] == pytest.approx(512_000 / rate["median"], rel=0.01)
    assert record["ended"]["epochs_complete"] < record["ended"]["epochs"] and "not seen" in page


def test_the_documents_have_the_figures_of_the_record() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "records/2026-11-28-tiny-imagenet-recipes.json").read_text())
    page = (root / "docs/benchmarks/recipes.md").read_text()
    for part in ("recipes", "switches", "switches_of_three_seeds"):
        for row in record[part]["table"]:
            mean, more = f"| {100 * row['mean']:.2f}", ""
            if row["difference"] is not None:
                more = f" {100 * row['difference']:+.2f}"
                assert row["difference"] == pytest.approx(sum(row["differences"]) / len(row["differences"]), abs=1e-5)
            lines = [line for line in page.splitlines() if mean in line and f"|{more}" in line]
            assert lines and all(f" {row['epochs']} | {row['compute']:.2f} " in line for line in lines), row["variant"]
    seed, *others = record["recipes"]["table"]
    assert seed["variant"] == "cpu_seed" and {row["variant"] for row in others} == {"modern", "fast"}
    assert all(min(row["differences"]) > 0.03 and len(row["differences"]) == 3 for row in others)
