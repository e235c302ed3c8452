from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest

import sdpnet.config.load
from sdpnet.config.load import absolute_paths, dump_config, load_config
from sdpnet.config.names import CONFIG_DIRECTORY
from sdpnet.config.options import Config
from sdpnet.config.renamed_keys import say_once
from sdpnet.config.resolution import image_size_of
from sdpnet.pipelines.errors import UserError

NAMES = sorted(str(p.relative_to(CONFIG_DIRECTORY).with_suffix("")) for p in CONFIG_DIRECTORY.rglob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml")) == config
    assert (CONFIG_DIRECTORY / f"{name}.yaml").read_text().startswith("# "), "says what it reaches, on what"


def test_the_shipped_names() -> None:
    assert {"debug", "demo", "cifar10", "cifar10_gpu", "sdpnet_l", "sdpnet_xl", "sdpnet_xxl"} <= set(NAMES)


@pytest.mark.parametrize("name", ["sdpnet_l", "sdpnet_xl", "sdpnet_xxl"])
def test_the_seed_recipe(name: str) -> None:
    config = load_config(name)
    assert config.model.name == name and config.model.dropout == 0.2
    assert config.data.batch_size_per_gpu * 8 == 960 and config.train.epochs > 200
    assert config.optim.lr / config.optim.lr_reference_batch * 960 == pytest.approx(0.001875)
    augment = config.augment
    assert (augment.randaugment.policy, augment.randaugment.num_ops, augment.randaugment.magnitude) == (
        "randaugment",
        2,
        9,
    )
    assert augment.erase.probability > 0 and augment.mix.mixup_alpha > 0 and augment.mix.cutmix_alpha > 0
    assert config.optim.warmup_epochs == 5 and config.optim.weight_decay == 0.05
    cycle, end = config.optim.restart_epochs, config.optim.warmup_epochs
    while end < config.train.epochs:
        end, cycle = end + cycle, cycle * config.optim.restart_factor
    assert end == config.train.epochs, "training ends at the bottom of a cycle"


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("8", 8), ("null", None)])
def test_micro_batch_is_a_word_or_a_number(text: str, value: object, tmp_path: Path) -> None:
    config = load_config("debug", [f"train.micro_batch={text}"])
    assert config.train.micro_batch == value
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_settings_override_in_order() -> None:
    config = load_config("debug", ["optim.lr=1e-5", "data.crop.scale=[0.5, 1]", "seed=3", "seed=4", "optim.eps=1"])
    assert config.optim.lr == 1e-5 and config.data.crop.scale == (0.5, 1.0) and config.seed == 4
    assert isinstance(config.optim.eps, float)


def test_keys_of_earlier_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: debug\ndata: {read_ahead_batches: 9, hw_decoder_load: 0.5}\n")
    config = load_config(str(path), ["data.read_ahead_batches=0"])
    assert config.data.native.read_ahead_batches == 0 and config.data.dali.hw_decoder_load == 0.5
    assert capsys.readouterr().err.splitlines() == [
        f"{path}: data.read_ahead_batches is now data.native.read_ahead_batches",
        f"{path}: data.hw_decoder_load is now data.dali.hw_decoder_load",
        "--set data.read_ahead_batches=0: data.read_ahead_batches is now data.native.read_ahead_batches",
    ]
    config = load_config("debug", ["data={read_ahead_batches: 3, image_size: 32}"])
    assert config.data.native.read_ahead_batches == 3
    assert capsys.readouterr().err == "--set: data.read_ahead_batches is now data.native.read_ahead_batches\n"
    say_once("once for all processes", {"RANK": "1"})
    assert capsys.readouterr().err == ""
    path.write_text("data: {read_ahead_batches: 9, native: {read_ahead_batches: 8}}\n")
    with pytest.raises(
        UserError, match=r"mine\.yaml: data\.read_ahead_batches is the old name of data\.native\.read_ah"
    ):
        load_config(str(path))
    path.write_text("data: {read_ahead_batches: 9, native: 8}\n")
    with pytest.raises(UserError, match=r"unknown config key 'data\.read_ahead_batches'"):
        load_config(str(path))


def test_all_of_the_recipes_augmentation_is_one_setting_away() -> None:
    assert load_config("debug").augment.randaugment.enabled
    assert not load_config("debug", ["augment.randaugment.policy=none"]).augment.randaugment.enabled


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lrr=1", r"unknown config key 'optim\.lrr': did you mean 'lr'\?"),
        ("optin.lr=1", r"unknown config key 'optin': did you mean 'optim'\?"),
        (
            "data.native.read_ahead=1",
            r"unknown config key 'data\.native\.read_ahead': did you mean 'read_ahead_batches'",
        ),
        ("data.dali.hw_decoder_load=2", r"data\.dali\.hw_decoder_load = 2\.0: must be in \[0, 1\]"),
        ("data.crop.scales=1", r"unknown config key 'data\.crop\.scales': did you mean 'scale'\?"),
        ("optim.lr=fast", r"optim\.lr = 'fast': must be a number"),
        ("optim.lr=-1", r"optim\.lr = -1\.0: must be above 0"),
        ("train.epochs=1.5", r"train\.epochs = 1\.5: must be a whole number"),
        ("train.epochs=true", r"train\.epochs = True: must be a whole number"),
        ("train.epochs=0", r"train\.epochs = 0: must be at least 1"),
        ("optim.name=muom", r"optim\.name = 'muom': did you mean 'muon'\?"),
        ("optim.layer_decay=0", r"optim\.layer_decay = 0\.0: must be in \(0, 1\]"),
        ("ema.decay=1", r"ema\.decay = 1\.0: must be in \[0, 1\)"),
        ("loss.kind=mse", r"loss\.kind = 'mse': there are ce, bce"),
        ("loss.target_threshold=0.2", r"loss\.target_threshold = 0\.2: must be null for loss\.kind ce"),
        ("loss.sum_classes=true", r"loss\.sum_classes = True: must be false for loss\.kind ce"),
        ("loss={kind: bce, target_threshold: 1}", r"loss\.target_threshold = 1\.0: must be in \[0, 1\)"),
        ("optim.restart_epochs=-1", r"optim\.restart_epochs = -1\.0: must be 0 \(no restarts\) or more"),
        ("optim={lr: 1e-3, min_lr: 2e-3}", r"optim\.min_lr = 0\.002: must be 0 to optim\.lr \(0\.001\)"),
        ("train.timeout_seconds=1e12", r"train\.timeout_seconds = 1000000000000\.0: must be 1 to 10000000"),
        ("augment.mean=[123.7, 116.3, 103.5]", r"augment\.mean = .*: must be in \[0, 1\] \(levels from 0 to 255 are"),
        ("augment.std=[0.2, 0.2, 1e-30]", r"augment\.std = .*: must be in \[1e-6, 1\]"),
        ("augment.mix.cutmix_alpha=1e-300", r"augment\.mix\.cutmix_alpha = 1e-300: must be 0 \(off\) or more, at most"),
        ("data.prefetch_batches=null", r"data\.prefetch_batches = None: must be a whole number"),
        ("data.path=2026-13-45", r"--set data\.path=2026-13-45: the value is not valid YAML"),
        (f"seed={2**64}", r"seed = 18446744073709551616: must be a whole number of at most 64 bits"),
        (f"seed={'9' * 5000}", r"--set seed=9+: the value is not valid YAML"),
        (f"seed={'9' * 400}", r"seed = '999999999999\.\.\.9999': must be a whole number of at most 64 bits"),
        (
            "resolution={start_size: 32, end_epoch: 2}",
            r"resolution\.end_epoch = 2: must be at most train\.epochs \(1\)",
        ),
        ("model.transformer_blocks=0", r"model\.transformer_blocks = 0: must be at least 1"),
        ("train.micro_batch=aut", r"train\.micro_batch = 'aut': did you mean 'auto'\?"),
        ("train.micro_batch=0", r"train\.micro_batch = 0: must be auto, null or at least 1"),
        ("train.micro_batch=1.5", r"train\.micro_batch = 1\.5: must be a whole number"),
        ("train.max_nonfinite=-1", r"train\.max_nonfinite = -1: must be 0 or more"),
        ("optim.warmup_epochs=9", r"optim\.warmup_epochs = 9\.0: must be at most train\.epochs \(1\)"),
        ("train.amp=bf61", r"train\.amp = 'bf61': did you mean 'bf16'\?"),
        ("data.pipeline=dalli", r"data\.pipeline = 'dalli': did you mean 'dali'\?"),
        ("data.crop.scale=[1]", r"data\.crop\.scale = \[1\]: must be a list of 2 numbers"),
        ("data.crop.scale=[0.9, 0.1]", r"data\.crop\.scale = \(0\.9, 0\.1\): must be 0 < low <= high <= 1"),
        ("data.crop=7", r"data\.crop = 7: must be a section with the keys scale"),
        ("augment.randaugment.policy=randaug", r"randaugment\.policy = 'randaug': did you mean 'randaugment'\?"),
        ("augment.randaugment={policy: increasing, magnitude: 12}", r"augment\.randaugment\.magnitude = .*: must be"),
        ("augment.randaugment.num_ops=9", r"augment\.randaugment\.num_ops = 9: must be 1 to 8"),
        ("augment.erase.mode=noise", r"augment\.erase\.mode = 'noise': there are constant, colour, pixel"),
        ("augment.erase.probability=1.5", r"augment\.erase\.probability = 1\.5: must be in \[0, 1\]"),
        ("data.image_size=65", r"data\.image_size = 65: must be a multiple of the patch size 16"),
        ("augment.mix.mixup_alpha=-0.1", r"augment\.mix\.mixup_alpha = -0\.1: must be 0 \(off\) or more"),
        ("augment.label_smoothing=1", r"augment\.label_smoothing = 1\.0: must be in \[0, 1\)"),
        ("model.name=sdpnet_x", r"model\.name = 'sdpnet_x': did you mean 'sdpnet_xl'\?"),
        ("model.heads=3", r"model\.heads = 3: must divide model\.dim"),
        ("seed", r"--set seed: must look like section\.key=value"),
        ("optim.lr=[", r"--set optim\.lr=\[: the value is not valid YAML"),
        ("seed.x=1", r"--set seed\.x=1: seed is no section"),
        ("log.profile=[1, 5]", r"log\.profile = \(1, 5\): must be \[first step, from 2; number of steps"),
        ("log.profile=[5, 0]", r"log\.profile = \(5, 0\): must be"),
        ("log.wandb=true", r"log\.wandb = True: must be text"),
        ("data.order=sequential", r"data\.order = 'sequential': must be random or blocks"),
    ],
)
def test_mistakes_are_one_line_that_helps(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config("debug", [setting])
    assert "\n" not in str(caught.value)


def leaves(hint: Any, where: str) -> Iterator[tuple[str, type, int]]:
    """Every key of the sections below `hint` that holds numbers: its name, their type, and how many there are."""
    if is_dataclass(hint):
        for name, inner in typing.get_type_hints(hint).items():
            yield from leaves(inner, f"{where}.{name}".removeprefix("."))
    for number in (int, float):
        if hint is number or (typing.get_origin(hint) in (typing.Union, types.UnionType) and number in get_args(hint)):
            yield where, number, 0
        if typing.get_origin(hint) is tuple and get_args(hint)[0] is number:
            yield where, number, len(get_args(hint))


NUMBERS = list(leaves(Config, ""))


def refusal(key: str, value: Any) -> str:
    """What a file that sets `key` is told."""
    for name in reversed(key.split(".")):
        value = {name: value}
    with pytest.raises(UserError) as caught:
        sdpnet.config.load._build(Config, value, "")
    return str(caught.value)


@pytest.mark.parametrize(("key", "kind", "count"), NUMBERS, ids=lambda value: str(value))
def test_no_number_of_any_key_is_infinite(key: str, kind: type, count: int) -> None:
    """One mechanism for all keys: also for those of sections that are yet to come."""
    values: list[Any] = [
        -(10**400),
        *([math.inf, math.nan, "-inf", "nan", 1e39, "-1e999"] if kind is float else [2**70]),
    ]
    for value in values:
        for place in range(max(1, count)):
            message = refusal(key, [value if n == place else 0 for n in range(count)] if count else value)
            assert message.startswith(f"{key} = ") and "must be a" in message, message
            assert len(message) < 200 and "\n" not in message


def test_the_numbers_of_all_sections_are_tried() -> None:
    keys = {key for key, _, _ in NUMBERS}
    assert {"seed", "augment.mean", "model.layer_scale", "optim.betas", "data.crop.ratio", "train.micro_batch"} <= keys
    assert len(keys) > 60


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -(2**63)])
def test_a_seed_of_64_bits(seed: int) -> None:
    assert load_config("debug", [f"seed={seed}"]).seed == seed


def test_paths_hold_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links in them stay links; an empty path stays empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    config = absolute_paths(load_config("debug", ["data.path=link/../set", "train.start_from=~/run"]))
    assert config.data.path == str(tmp_path / "link" / ".." / "set") and config.train.start_from == "/home/user/run"
    assert absolute_paths(config) == config
    assert absolute_paths(Config()) == Config()


def test_a_threshold_that_every_class_passes() -> None:
    smoothed = ["augment.label_smoothing=0.1", "model.num_classes=10"]
    load_config("debug", [*smoothed, "loss={kind: bce, target_threshold: 0.02}"])
    load_config("debug", [*smoothed[:1], "loss={kind: bce, target_threshold: 0.02}"])  # as many classes as the data has
    for threshold in (0, 0.01):
        with pytest.raises(UserError, match=r"loss\.target_threshold = .* must be above augment\.label_smoothing"):
            load_config("debug", [*smoothed, f"loss={{kind: bce, target_threshold: {threshold}}}"])


def test_a_name_that_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config 'debugg': did you mean 'debug'"):
        load_config("debugg")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(UserError, match=r"broken\.yaml: not valid YAML"):
        load_config(str(broken))
    broken.write_text("- 1")
    with pytest.raises(UserError, match="must be sections"):
        load_config(str(broken))
    broken.write_text(f"extends: {broken}")
    with pytest.raises(UserError, match="extends itself"):
        load_config(str(broken))


def test_defaults_are_a_valid_config() -> None:
    assert Config().data.image_size == 224


def test_the_models_switches_reach_its_options() -> None:
    """Also `none`, which is text in YAML."""
    switches = {"position": "rope", "grid_size": 7, "layer_scale": 1e-4, "drop_path": 0.2, "final_norm": True}
    config = load_config("sdpnet_xl", [f"model.{key}={str(value).lower()}" for key, value in switches.items()])
    options = config.model.options(num_classes=10)
    assert {key: getattr(options, key) for key in switches} == switches
    assert load_config("sdpnet_xl", ["model.position=none"]).model.options(num_classes=10).position == "none"
    with pytest.raises(UserError, match=r"model\.position = 'ropes': did you mean 'rope'"):
        load_config("sdpnet_xl", ["model.position=ropes"])


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return result


@pytest.mark.parametrize(("size", "drop_path"), [("l", 0.1), ("xl", 0.2), ("xxl", 0.3)])
def test_the_modern_recipe_and_each_difference_as_one_key(size: str, drop_path: float) -> None:
    seed, modern = (flat(asdict(load_config(f"{where}sdpnet_{size}"))) for where in ("", "modern/"))
    assert {key: value for key, value in modern.items() if value != seed[key]} == {
        "model.dropout": 0.0,
        "model.position": "sincos",
        "model.final_norm": True,
        "model.qk_norm": True,
        "model.drop_path": drop_path,
        "augment.randaugment.policy": "increasing",
        "augment.erase.mode": "pixel",
        "augment.label_smoothing": 0.1,
        "optim.name": "muon",
        "optim.clip_grad_norm": 1.0,
        "optim.warmup_epochs": 20.0,
        "optim.schedule": "cosine",
        "ema.decay": 0.9999,
        "train.epochs": 300,
    }


def test_the_fast_recipes_are_the_modern_one_with_growing_images() -> None:
    modern = load_config("modern/sdpnet_l")
    for epochs in (16, 40, 100):
        config = load_config(f"fast/sdpnet_l_{epochs}")
        assert config.train.epochs == epochs and config.optim.name == "muon" and config.model.drop_path < 0.1
        assert replace(config.model, drop_path=0.0) == replace(modern.model, drop_path=0.0)
        sizes = [image_size_of(epoch, config.resolution, 224) for epoch in range(epochs)]
        assert set(sizes) == {128, 160, 192} and sizes == sorted(sizes) and config.data.image_size == 224
        assert sizes.count(192) >= 0.35 * epochs
    two = load_config("fast/sdpnet_l_2v100")
    assert 2 * two.data.batch_size_per_gpu * two.train.accumulate == 960
    assert replace(two, train=replace(two.train, accumulate=1)) == load_config("fast/sdpnet_l_40")
