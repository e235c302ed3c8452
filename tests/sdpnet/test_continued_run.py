"""A run that is continued: with other classes, other images, another config, from elsewhere, or when it is finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainings import arguments, metrics, same_run, stop_after

from sdpnet.checkpoints.file import write_checkpoint
from sdpnet.checkpoints.model import latest_checkpoint, load_checkpoint
from sdpnet.pipelines.shards.manifest import Manifest, read_manifest
from sdpnet.train import main


def altered(shards: Path, out: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """The same shard set but for its manifest."""
    out.mkdir()
    for path in shards.iterdir():
        if path.name != "manifest.json":
            (out / path.name).symlink_to(path)
    (out / "manifest.json").write_text(change(read_manifest(shards)).to_json())
    return out


def with_classes(*names: str) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, classes=names)


def with_other_images(split: str) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        before = manifest.splits[split]
        files = tuple(replace(file, sha256="0" * 64) for file in before.files)
        return replace(manifest, splits={**manifest.splits, split: replace(before, files=files)})

    return change


@pytest.fixture
def stopped(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two epochs, stopped after step 2."""
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        assert main(arguments(shard_set, tmp_path / "run")) == 130
    return tmp_path / "run"


def continued(run: Path, *command: str) -> list[str]:
    settings = ["train.log_interval=100", "train.epochs=1", *command]
    return ["--resume", "--out", str(run), *(part for setting in settings for part in ("--set", setting))]


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        (("ant", "cow", "bee"), "class 1 is 'bee' there and 'cow' here (the same names in another order)"),
        (("ant", "bee", "dog"), "class 2 is 'cow' there and 'dog' here"),
    ],
)
def test_other_classes_are_refused_unless_a_key_allows_them(
    names: tuple[str, ...],
    difference: str,
    stopped: Path,
    shard_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = altered(shard_set, tmp_path / "other", with_classes(*names))
    capsys.readouterr()
    assert main(continued(stopped, f"data.path={other}")) == 2
    out, err = capsys.readouterr()
    assert f"was trained on other classes than those of {other}: {difference}; " in err and err.count("\n") == 1
    assert "set train.other_classes=keep" in err and out == ""
    assert main(continued(stopped, f"data.path={other}", "train.other_classes=keep")) == 0
    assert f"{other}: other classes than before, under the same numbers: {difference}\n" in capsys.readouterr().out
    assert tuple(json.loads((stopped / "model.json").read_text())["classes"]) == names
    assert main(arguments(other, tmp_path / "new", f"train.start_from={stopped}", "train.epochs=1")) == 0
    capsys.readouterr()
    assert main(arguments(shard_set, tmp_path / "anew", f"train.start_from={stopped}", "train.epochs=1")) == 2
    assert "was trained on other classes: class " in capsys.readouterr().err


def test_other_images_and_each_changed_key_are_said(
    stopped: Path, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = altered(shard_set, tmp_path / "other", with_other_images("train"))
    capsys.readouterr()
    assert main(continued(stopped, f"data.path={other}", "optim.lr=0.002")) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith((f"{other}: ", "config: "))] == [
        f"{other}: the images of split 'train' are not those that the run has used so far (other checksums)",
        f"config: data.path was {shard_set}, is {other} from here on",
        "config: optim.lr was 0.001, is 0.002 from here on",
        "config: train.epochs was 2, is 1 from here on",
        "config: train.log_interval was 1, is 100 from here on",
    ]
    newest = latest_checkpoint(stopped / "checkpoints")
    assert newest is not None
    fingerprint = load_checkpoint(newest)["data"]["train"]
    assert fingerprint == read_manifest(other).splits["train"].fingerprint
    assert fingerprint != read_manifest(shard_set).splits["train"].fingerprint


def test_nothing_is_said_where_nothing_changed(
    stopped: Path, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a relative path is the directory that it was when the run began."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "shards").symlink_to(shard_set)
    monkeypatch.chdir(tmp_path / "home")
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert main(arguments(Path("shards"), Path("run"), "train.epochs=1")) == 130
    assert capsys.readouterr().out.endswith(
        "stopped after step 3; sdpnet train --resume --out run continues exactly there\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "--out", "home/run"]) == 0
    out = capsys.readouterr().out
    assert "resumed from " in out and "config: " not in out and "images of split" not in out
    assert out.endswith("next: sdpnet report home/run, or: sdpnet predict --model home/run IMAGE\n")


def test_a_finished_run_says_so_and_stays_as_it_is(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    assert main(arguments(shard_set, run, "train.epochs=1")) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for settings, of in (([], "1 of 1"), (["--set", "optim.lr=1"], "1 of 1")):
        capsys.readouterr()
        assert main(["--resume", "--out", str(run), *settings]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"{run}: the run is finished: epoch {of}, 6 steps; nothing is left to do",
            f"to train longer: sdpnet train --resume --out '{run}' --set train.epochs=2",
            f"next: sdpnet report '{run}', or: sdpnet predict --model '{run}' IMAGE",
        ]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (run / "model.safetensors").unlink()  # as if killed between the last checkpoint and the model
    assert main(["--resume", "--out", str(run)]) == 0
    assert (run / "model.safetensors").read_bytes() == before[run / "model.safetensors"]
    assert main(["--resume", "--out", str(run), "--set", "train.epochs=2"]) == 0
    assert [line["step"] for line in metrics(run) if "train_loss" in line] == list(range(1, 13))


def test_where_there_is_nothing_to_resume(
    stopped: Path, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typo = tmp_path / "rnu"
    capsys.readouterr()
    assert main(["--resume", "--out", str(typo)]) == 2
    assert capsys.readouterr().err == f"error: {typo}: no run is there to resume; did you mean --out {stopped}?\n"
    assert not typo.exists()
    assert main(["--out", str(stopped)]) == 2
    assert capsys.readouterr().err.endswith(
        f"or continue the run that is there: sdpnet train --resume --out {stopped}\n"
    )
    assert main(["--resume", *arguments(shard_set, typo, "train.epochs=1")]) == 0  # for jobs that always pass it
    assert f"no checkpoint in {typo / 'checkpoints'} yet: the run begins\n" in capsys.readouterr().out


def test_a_run_that_was_begun_with_old_keys_continues(
    stopped: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before there were sections for each executor, their knobs stood in the section `data` itself."""

    def as_before(data: dict[str, Any]) -> None:
        data["read_ahead_batches"] = data.pop("native")["read_ahead_batches"] + 1
        data["hw_decoder_load"] = data.pop("dali")["hw_decoder_load"]

    own, newest = stopped / "config.yaml", latest_checkpoint(stopped / "checkpoints")
    assert newest is not None
    values, state = yaml.safe_load(own.read_text()), load_checkpoint(newest)
    as_before(values["data"])
    as_before(state["config"]["data"])
    own.write_text(yaml.safe_dump(values))
    write_checkpoint(newest, state)
    capsys.readouterr()
    key = "data.native.read_ahead_batches"
    assert main(["--resume", "--out", str(stopped), "--set", f"{key}=7"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"{own}: data.read_ahead_batches is now {key}",
        f"{own}: data.hw_decoder_load is now data.dali.hw_decoder_load",
    ]
    assert f"config: {key} was 5, is 7 from here on" in out and "hw_decoder_load" not in out
    assert yaml.safe_load(own.read_text())["data"]["native"] == {"read_ahead_batches": 7}
    same_run(uninterrupted, stopped)
