"""The command that is typed next: quoted for the shell, and one that does what it says for the user's own paths."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conversion import convert_folder
from PIL import Image

from sdpnet import cli
from sdpnet.config.load import load_config
from sdpnet.pipelines.terminal import next_step
from sdpnet.pipelines.terminal.next_step import fresh, next_line, training
from sdpnet.preprocess import adopt, build_dali, build_ffcv, make_synthetic, verify
from sdpnet.preprocess import describe as report

ROOT = Path(__file__).resolve().parents[2]
ODD = (
    "a b",
    "it's",
    "$HOME `id`",
    '"',
    "\\",
    "*",
    "~",
    "#",
    "",
    "猫",
    "\x1b[2J",
    "two\nlines\\'",
    "caf\udce9",
    "\u202e",
    "!x",
)


def words(line: str) -> list[str]:
    """What the shell makes of a line `next: COMMAND`."""
    assert line.startswith("next: ") and "\n" not in line and "\x1b" not in line
    command = ["bash", "-c", f"for word in {line.removeprefix('next: ')}\ndo printf '%s\\0' \"$word\"; done"]
    return [
        os.fsdecode(word) for word in subprocess.run(command, capture_output=True, check=True).stdout.split(b"\0")[:-1]
    ]


def last(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return words(capsys.readouterr().out.splitlines()[-1])


def test_any_path_comes_through_the_shell() -> None:
    assert words(next_line("sdpnet", *ODD, *map(Path, ODD))) == ["sdpnet", *ODD, *(str(Path(text)) for text in ODD)]
    assert words(next_line("sdpnet", "--data", Path("-x"))) == ["sdpnet", "--data", "./-x"]
    assert words(next_line("sdpnet", when="when all\nare done")) == ["sdpnet"]


def test_what_the_terminal_cannot_show_comes_through_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    line = next_line("ls", "猫 é", "é")
    assert line == "next: ls $'\\347\\214\\253 \\303\\251' 'é'" and words(line) == ["ls", "猫 é", "é"]


def test_a_locale_with_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, the characters of a path stand for other bytes than in UTF-8."""
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1"))
    line = next_line("ls", "\x9b\xfc")
    command = ["bash", "-c", f"printf %s {line.removeprefix('next: ls ')}"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"\x9b\xfc"


def test_the_command_is_this_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bin_ = tmp_path / "env" / "bin"
    bin_.mkdir(parents=True)
    for name in ("python", "sdpnet"):
        (bin_ / name).write_text("#!/bin/sh\n")
        (bin_ / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bin_ / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(bin_))
    assert next_line(*next_step.sdpnet("train")) == "next: sdpnet train"
    assert next_line(next_step.python(), "-c", "x") == "next: python -c x"
    monkeypatch.setenv("PATH", "/nowhere")
    assert next_line(*next_step.sdpnet("train")) == "next: env/bin/sdpnet train"
    monkeypatch.chdir(ROOT)
    assert next_line(next_step.python(), "-c", "x") == f"next: {bin_}/python -c x"
    (bin_ / "sdpnet").unlink()
    assert next_line(*next_step.sdpnet("train")) == f"next: {bin_}/python -m sdpnet.cli train"


def test_a_fresh_name(tmp_path: Path) -> None:
    assert fresh(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").symlink_to("nowhere")
    assert fresh(tmp_path / "run") == tmp_path / "run-3"


def folder(root: Path, side: int, train: int, val: int) -> Path:
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            (root / split / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("L", (side, side)).save(root / split / f"c{number % 2}" / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("side", "train", "config"),
    [(32, 256, "cifar10"), (64, 256, "demo"), (161, 256, "sdpnet_xl"), (161, 255, "debug"), (32, 15, None)],
)
def test_the_config_fits_the_images(side: int, train: int, config: str | None, tmp_path: Path) -> None:
    convert_folder(folder(tmp_path / "images", side, train, 2), tmp_path / "shards")
    command = training(tmp_path / "shards")
    assert command[1:4] == ("train", "--config", config) if config else command == ()
    if config:
        assert load_config(config) is not None
        assert training(tmp_path / "shards", "demo", "--pipeline", "ffcv")[3] == "demo"


def test_nothing_to_train_on(shard_set: Path, tmp_path: Path) -> None:
    convert_folder(folder(tmp_path / "images", 8, 20, 0), tmp_path / "shards")
    assert training(tmp_path / "shards") == training(tmp_path) == ()
    assert training(shard_set)[1:4] == ("train", "--config", "debug")


def test_from_images_to_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command's last line, as the shell splits it, is run as the next command."""
    monkeypatch.chdir(tmp_path)
    made = ["--out", "my 'images'", "--classes", "2", "--train-per-class", "8", "--val-per-class", "2"]
    assert make_synthetic.main(made) == 0
    command = last(capsys)
    assert command[1] == "convert"
    assert command[2:] == ["--source", "my 'images'", "--out", "my 'images'-shards"]
    assert build_ffcv.main([*command[2:], "--workers", "1"]) == 0
    trained = ["train", "--config", "debug", "--data", "my 'images'-shards", "--out", "runs/my 'images'-shards"]
    assert last(capsys)[1:] == trained
    for check in (verify.main, lambda argv: report.main([*argv, "--images", "0"])):
        assert check(["my 'images'-shards"]) == 0
        assert last(capsys)[1:] == trained
    assert cli.main(["sheet", "--config", "debug", "--data", "my 'images'-shards", "--pipeline", "torchvision"]) == 0
    assert last(capsys)[1:] == [*trained[:5], "--pipeline", "torchvision", *trained[5:]]
    (tmp_path / "runs" / "my 'images'-shards").mkdir(parents=True)
    assert verify.main(["--quick", "my 'images'-shards"]) == 0
    assert last(capsys)[-1] == "runs/my 'images'-shards-2"
    for name in ("manifest.json", "train.crc32", "val.crc32"):
        (tmp_path / "my 'images'-shards" / name).unlink()
    files = ["--train", "my 'images'-shards/train.beton", "--val", "my 'images'-shards/val.beton"]
    assert adopt.main(files) == 0
    command = last(capsys)
    assert command[1:] == ["verify", "my 'images'-shards"]
    assert cli.main(command[1:]) == 0


def test_of_parts_and_of_what_cannot_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "images", 8, 4, 0)
    flags = ["--source", "images", "--out", "shards", "--workers", "1"]
    for part in ("1/2", "2/2"):
        assert build_dali.main([*flags, "--part", part]) == 0
        out = capsys.readouterr().out
        assert out.endswith("  # when all 2 parts are finished\n")
    command = words(out.splitlines()[-1])
    assert command[1:] == ["convert", "--format", "tar", "--merge", "--out", "shards"]
    assert cli.main(command[1:]) == 0
    assert last(capsys)[1:] == ["describe", "shards"]
    assert report.main(["shards", "--images", "0"]) == 0
    assert "next:" not in capsys.readouterr().out
