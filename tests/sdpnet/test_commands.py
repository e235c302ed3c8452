"""What all commands have in common: a quick answer to --help and to mistakes, --quiet."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from command_output import one_line

from sdpnet import __version__, cli
from sdpnet.config.load import load_config, similar_keys
from sdpnet.config.names import config_names
from sdpnet.pipelines.benchmarks.flags import PEER_NAMES
from sdpnet.pipelines.benchmarks.peers import PEERS
from sdpnet.pipelines.errors import run_command
from sdpnet.pipelines.executors.registry import PIPELINES
from sdpnet.pipelines.options import Pipeline
from sdpnet.pipelines.terminal.quiet import is_quiet, quietly

ALL = {**cli.COMMANDS, "bench step": cli.STEP}


def imported_by(*words: str) -> tuple[int, set[str], str]:
    """Runs a command in a process of its own: its exit status, the packages that it has imported, its stderr."""
    code = """
import atexit, sys
atexit.register(lambda: print("\\n@", *sorted({name.partition(".")[0] for name in sys.modules})))
from sdpnet.cli import main
sys.exit(main())
"""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, set(done.stdout.rpartition("\n@")[2].split()), done.stderr


@pytest.mark.parametrize("name", ALL)
def test_help_does_not_wait_for_slow_libraries(name: str) -> None:
    status, packages, error = imported_by(*name.split(), "--help")
    assert (status, error) == (0, "") and "argparse" in packages
    assert not packages & {"PIL", "jinja2", "numpy", "plotly", "rich", "torch", "torchvision", "triton", "zlib_ng"}


@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--resum", 2)])
def test_the_module_that_torchrun_starts_answers_without_torch(flag: str, status: int) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sdpnet.train", flag]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == status and "argparse" in imported and not imported & {"numpy", "torch"}


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["config"], ["config", "optim"], ["train", "--resum"]])
def test_what_else_needs_no_torch(words: list[str]) -> None:
    status, packages, _ = imported_by(*words)
    assert status == (2 if "--resum" in words else 0) and "argparse" in packages
    assert not packages & {"PIL", "numpy", "torch"}


@pytest.mark.parametrize("name", ALL)
def test_the_work_has_the_same_flags(name: str) -> None:
    command = ALL[name]
    assert importlib.import_module(command.module).add_arguments is importlib.import_module(command.flags).add_arguments


def test_the_names_in_the_flags_are_those_of_the_work() -> None:
    assert get_args(Pipeline) == ("auto", *PIPELINES) and tuple(PEERS) == PEER_NAMES


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"sdpnet {__version__}\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["--version", "config optim", "verify --quick SHARDS", "report nothing"])
def test_closed_standard_streams(words: str, closed: str, shard_set: Path) -> None:
    """Python has None in place of a stream that its parent has closed."""
    command = f"{sys.executable} -m sdpnet {words.replace('SHARDS', str(shard_set))} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == (2 if words == "report nothing" else 0), done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr


@pytest.mark.parametrize("words", ["config", "verify --quick SHARDS"])
def test_a_reader_that_leaves(words: str, shard_set: Path) -> None:
    """As `head` and `less` do: that is no mistake, so nothing is said."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sdpnet", *words.replace("SHARDS", str(shard_set)).split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert run_command(fail) == 2 and capsys.readouterr().err == "error: Broken pipe\n"


def test_the_package_is_a_command() -> None:
    command = [sys.executable, "-m", "sdpnet", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"sdpnet {__version__}\n"


def test_a_flag_that_is_typed_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["version"])
    assert capsys.readouterr().err.endswith("; did you mean --version?\n")


def test_the_help_of_train_lists_the_configs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"Configs: {', '.join(config_names())}. " in text and "All keys: sdpnet config;" in text


# ---- config keys


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("lr=1e-3", "'optim.lr'"),
        ("lrr=1e-3", "'optim.lr'"),
        ("train.lr=1e-3", "'optim.lr'"),
        ("batch_size_per_gpu=8", "'data.batch_size_per_gpu'"),
        ("seeed=8", "'seed'"),
        ("name=adamw", "'model.name' or 'optim.name'"),
        ("optim.lrr=1", "'lr'"),
    ],
)
def test_a_key_without_its_section(setting: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"^unknown config key '{setting.partition('=')[0]}': did you mean {key}\\?$"):
        load_config("debug", [setting])
    assert similar_keys("nothing_like_it") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--lr", "1e-3", "--out", "x"], "(--lr: a config key is written as optim.lr=VALUE)"),
        (["train", "--batch-size-per-gpu=8", "--out", "x"], "as data.batch_size_per_gpu=VALUE)"),
        (["train", "--seed", "8", "--out", "x"], "(--seed: a config key is written as seed=VALUE)"),
        (["train", "--confg", "x", "--out", "x"], "(--confg: did you mean --config?)"),
        (["train", "--optim.lr", "--out", "x"], "--optim.lr: no value; write optim.lr=VALUE"),
        (["train", "--optim.lr=1"], "the following arguments are required: --out"),
        (["lab", "--seed", "8", "--out", "x"], "(--seed: did you mean --seeds?)"),
        (["convert", "--qualty", "8", "--out", "x"], "(--qualty: did you mean --quality?)"),
        (["convrt"], "did you mean 'convert'?"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
    ],
)
def test_mistyped(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and message in line
    if words[1:] == ["--optim.lr=1"]:
        assert line.endswith(message)


def test_sdpnet_config_knows_a_key_without_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    one_line(cli.main(["config", "lr"]), capsys, "no config section or key 'lr': did you mean 'optim.lr'?")


# ---- conversion


def test_convert_writes_both_formats(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "--source", str(image_folder), "--workers", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "train.beton").is_file()
    assert cli.main([*command, str(tmp_path / "b"), "--format", "tar", "--shard-mib", "1"]) == 0
    assert (tmp_path / "b" / "train-000000.tar").is_file()
    assert capsys.readouterr().out.count("\nnext: ") == 2
    one_line(cli.main([*command, str(tmp_path / "c"), "--shard-mib", "1"]), capsys, "--shard-mib", "--format tar")
    one_line(cli.main([*command, str(tmp_path / "c"), "--format", "tar", "--shard-mib", "0"]), capsys, "at least 1")
    assert not (tmp_path / "c").exists()
    for folder in ("a", "b"):
        assert cli.main(["verify", "--quiet", str(tmp_path / folder)]) == 0
    assert "next: " not in capsys.readouterr().out


def test_the_merge_of_small_tars_has_their_size(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", "--source", str(image_folder), "--out", str(tmp_path / "s"), "--workers", "1", "--part", "1/2"]
    assert cli.main([*words, "--format", "tar", "--shard-mib", "3"]) == 0
    assert f"convert --format tar --shard-mib 3 --merge --out {tmp_path}/s" in capsys.readouterr().out


# ---- --quiet


def test_quiet(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither progress nor a next command, from images to a trained model. Results stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.monotonic", iter(range(0, 10**9, 100)).__next__)  # each line of progress is due
    assert cli.main(["convert", "--source", str(image_folder), "--out", "shards", "--workers", "1", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "images found" in out and "next: " not in out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["adopt", "--source", str(image_folder), "--out", "index", "--workers", "1", "--quiet"]) == 0
    assert cli.main(["describe", "shards", "--images", "0", "--quiet"]) == 0
    words = ["--config", "debug", "--pipeline", "torchvision", "--data", "shards", "--out", "run", "--quiet"]
    settings = ["--data.batch_size_per_gpu=4", "--data.num_workers", "1", "train.epochs=1", "train.log_interval=1"]
    assert cli.main(["train", *words, *settings]) == 0
    out, err = capsys.readouterr()
    assert "next: " not in out and "epoch 1  step" not in out and "waiting for data" not in out
    assert out.endswith("done: run/model.safetensors\n")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") > 1
    for words in (["report", "run"], ["export", "--model", "run", "--format", "torch-export", "--out", "m.pt2"]):
        assert cli.main([*words, "--quiet"]) == 0
        out, _ = capsys.readouterr()
        assert "next: " not in out and out
    assert not is_quiet()


def test_quiet_ends_with_the_command() -> None:
    with pytest.raises(KeyError), quietly(True):
        assert is_quiet()
        raise KeyError
    assert not is_quiet()
