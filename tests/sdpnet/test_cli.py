"""The commands as a user meets them: results, and mistakes that end in one line and exit status 2."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_output import one_line
from conversion import write_manifest

from sdpnet import cli, train
from sdpnet.checkpoints.model import load_model
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.preprocess import build_ffcv


@pytest.fixture(scope="module")
def finished_run(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert train.main(["--out", str(out), *training(shard_set)]) == 0
    return out


def training(data: Path, *more: str) -> list[str]:
    fixed = ["--config", "debug", "--pipeline", "torchvision", "--data", str(data)]
    return [*fixed, "--set", "data.batch_size_per_gpu=4", "--set", "data.num_workers=1", *more]


def test_evaluate_prints_what_training_reported(
    finished_run: Path, shard_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", str(finished_run), "--data", str(shard_set), "--pipeline", "torchvision"]
    assert cli.main([*command, "--batch-size", "4", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    card = load_model(finished_run)[1]
    assert card.preprocessing == Preprocessing("ignore", 500)  # of the shard set that it was trained on
    reported = card.metrics
    assert scores["num_samples"] == 10 and scores["top1"] == reported["top1"]
    assert scores["val_loss"] == pytest.approx(reported["val_loss"])
    assert cli.main([*command, "--batch-size", "3", "--image-size", "96"]) == 0


def test_predict_names_classes_with_probabilities(
    finished_run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((image_folder / "val").rglob("*.*"))[:3]
    assert cli.main(["predict", "--model", str(finished_run), *map(str, images)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * (1 + 3)
    for start, image in zip(range(0, 12, 4), images, strict=True):
        assert lines[start] == str(image)
        chances = [float(line.split("%")[0]) for line in lines[start + 1 : start + 4]]
        assert sum(chances) == pytest.approx(100, abs=0.1) and chances == sorted(chances, reverse=True)
        assert {line.split()[-1] for line in lines[start + 1 : start + 4]} == {"ant", "bee", "cow"}


def damaged_set(shard_set: Path, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    copy = tmp_path / "damaged"
    shutil.copytree(shard_set, copy)
    change(copy)
    return copy


def truncate(directory: Path) -> None:
    with (directory / "train.beton").open("r+b") as file:
        file.truncate(10_000_000)


def other_version(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    write_manifest(directory, {**manifest, "schema_version": 99})


def test_mistakes_in_training(
    shard_set: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    one_line(train.main([*out, *training(damaged_set(shard_set, tmp_path / "a", truncate))]), capsys, "truncated")
    other = damaged_set(shard_set, tmp_path / "b", other_version)
    one_line(train.main([*out, *training(other)]), capsys, "schema version 99", "manifest.json")
    one_line(train.main([*out, *training(shard_set, "--set", "optim.lrr=1")]), capsys, "did you mean 'lr'")
    one_line(train.main([*out, *training(shard_set, "--set", "model.num_classes=2")]), capsys, "must be at least 3")
    one_line(train.main([*out, *training(tmp_path / "nowhere")]), capsys, "nowhere", "manifest.json")
    one_line(train.main(out), capsys, "--config NAME")
    one_line(train.main(["--out", str(finished_run), *training(shard_set)]), capsys, "--resume")
    resumed = ["--out", str(finished_run), "--resume", *training(shard_set, "--set", "model.dim=32")]
    one_line(train.main(resumed), capsys, "of another model", "step_00000006.pt")
    fewer = ["--out", str(finished_run), "--resume", *training(shard_set, "--set", "seed=5")]
    one_line(train.main(fewer), capsys, "was trained with seed 0, not 5")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    one_line(train.main(["--out", str(tmp_path / "file"), *training(shard_set)]), capsys, "file", "exists")
    one_line(train.main(["--out", "/proc/run", *training(shard_set)]), capsys, "/proc/run")


def test_a_missing_backend(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for loaded in [m for m in sys.modules if m.startswith("ffcv.") or m == "sdpnet.pipelines.executors.ffcv"]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    command = ["--out", str(tmp_path / "out"), *training(shard_set), "--pipeline", "ffcv"]
    one_line(train.main(command), capsys, "pipeline 'ffcv' cannot be used here", install_extra("ffcv"), "torchvision")


def test_mistakes_in_evaluation_and_prediction(
    shard_set: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(shard_set), "--pipeline", "torchvision"]
    one_line(cli.main(["evaluate", "--model", str(tmp_path), *data]), capsys, "model.safetensors", "not there")

    def rename_a_class(directory: Path) -> None:
        manifest = json.loads((directory / "manifest.json").read_text())
        write_manifest(directory, {**manifest, "classes": ["a", "b", "c"]})

    other = damaged_set(shard_set, tmp_path, rename_a_class)
    command = ["evaluate", "--model", str(finished_run), "--data", str(other), "--pipeline", "torchvision"]
    difference = "was trained on other classes than those of"
    one_line(cli.main(command), capsys, difference, "class 0 is 'ant' there and 'a' here")
    (tmp_path / "not.jpg").write_text("no image")
    for name in ("not.jpg", "absent.jpg"):
        one_line(cli.main(["predict", "--model", str(finished_run), str(tmp_path / name)]), capsys, name)


def test_mistakes_in_conversion(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(source: Path) -> int:
        return build_ffcv.main(["--source", str(source), "--out", str(tmp_path / "shards")])

    (tmp_path / "empty").mkdir()
    one_line(convert(tmp_path / "empty"), capsys, "empty", "no class folders")
    source = tmp_path / "source"
    shutil.copytree(image_folder, source)
    (source / "train" / "dog").mkdir()
    one_line(convert(source), capsys, "dog", "without images")
    (source / "train" / "dog" / "1.JPEG").write_text("no image")
    one_line(convert(source), capsys, "1.JPEG", "not an image")
    assert not (tmp_path / "shards" / "manifest.json").exists()


def run(*arguments: object, code: str = "from sdpnet.cli import main; sys.exit(main())") -> tuple[int, str, str]:
    """Runs the `sdpnet` command in a process of its own: exit status, stdout, stderr."""
    command = [sys.executable, "-c", f"import sys; {code}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_verify_is_a_subcommand(shard_set: Path, tmp_path: Path) -> None:
    status, stdout, stderr = run("verify", "--quick", shard_set)
    assert (status, stderr) == (0, "") and stdout.startswith("34 samples in train, val")
    damaged = damaged_set(shard_set, tmp_path, truncate)
    status, _, stderr = run("verify", damaged)
    assert status == 1 and stderr.startswith("train.beton: 10,000,000 bytes, not the manifest's")
    status, _, stderr = run("verify", shard_set, "--fast")
    assert status == 2 and stderr.startswith("usage: sdpnet verify [-h]") and "unrecognized arguments: --fast" in stderr


def test_what_needs_no_torch_does_not_wait_for_it(shard_set: Path) -> None:
    code = "from sdpnet.cli import main; import atexit; atexit.register(lambda: print('torch' in sys.modules)); main()"
    for arguments in (["verify", "--quick", shard_set], ["describe", shard_set, "--help"], ["--help"], ["--version"]):
        status, stdout, stderr = run(*arguments, code=code)
        assert (status, stderr) == (0, "") and stdout.endswith("\nFalse\n"), arguments


def test_ctrl_c_in_a_program_of_the_other_package(shard_set: Path) -> None:
    interrupted = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from sdpnet.pipelines.shards import layout
layout.sha256_of = lambda path, first: os.kill(os.getpid(), signal.SIGINT)
from sdpnet.cli import main
sys.exit(main())
"""
    assert run("verify", shard_set, code=interrupted) == (130, "", "interrupted\n")


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r"    \w", line)]
    assert caught.value.code == 0
    assert listed[:9] == ["convert", "adopt", "verify", "describe", "train", "evaluate", "predict", "report", "export"]
    assert listed[9:] == ["lab", "sheet", "bench", "doctor", "config", "completion"]


ALONE = [f"preprocess.{name}" for name in ("adopt", "build_dali", "build_ffcv", "convert", "describe")]
ALONE += ["preprocess.make_synthetic", "preprocess.verify"]
ALONE += ["pipelines.bench", "pipelines.benchmarks.augment", "benchmarks.depthwise", "benchmarks.step", "train"]


@pytest.mark.parametrize(
    "module", [*(f"sdpnet.{name}" for name in ALONE), *(command.module for command in cli.COMMANDS.values())]
)
def test_every_command_has_the_same_functions(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, parser = importlib.import_module(module), argparse.ArgumentParser()
    assert command.add_arguments(parser) is None and len(parser._actions) > 1
    assert list(inspect.signature(command.run).parameters) == ["arguments"]
    assert {"add_arguments", "run"} <= set(command.__all__)
    if module.removeprefix("sdpnet.") in ALONE:  # can be started by itself
        assert "main" in command.__all__
        with pytest.raises(SystemExit) as caught:
            command.main(["--help"])
        assert caught.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


def test_the_commands_and_flags_of_train_are_few() -> None:
    """A new flag is a decision: most settings belong into the config."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert flags == {
        "-h",
        "--help",
        "--config",
        "--data",
        "--out",
        "--pipeline",
        "--set",
        "--resume",
        "--profile",
        "--quiet",
    }
