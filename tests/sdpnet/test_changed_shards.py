"""Shards that are replaced, cut or overwritten while they are in use, and what is no file in a file's place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import write_manifest
from pipeline_batches import collect, installed, load, pipeline
from special_files import SPECIAL_FILES
from trainings import arguments, stop_after

from sdpnet.checkpoints.model import latest_checkpoint, load_checkpoint
from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.preprocess.inspection.survey import survey
from sdpnet.preprocess.verify import main as verify_main
from sdpnet.preprocess.verify import verify
from sdpnet.train import main
from sdpnet.training.step import TrainingStep

FAST = "native" if installed("native") else "torchvision"


@pytest.fixture
def beton(shard_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path / "beton"))


@pytest.fixture
def tars(tar_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tar_set, tmp_path / "tars"))


@pytest.mark.parametrize(
    ("name", "workers"),
    [pipeline("native", 2), ("torchvision", 1), ("torchvision", 2), pipeline("dali", 2), pipeline("ffcv", 2)],
)
def test_a_shard_that_is_replaced_and_then_cut(name: str, workers: int, beton: Path) -> None:
    """Another file of the same size under its name: the one that was opened is read on, and when that is cut, it is
    named."""
    if name == "ffcv" and not installed("native"):
        pytest.skip("FFCV reads ahead through its map, which only the native library guards")
    loader = load(beton, name, num_workers=workers)
    before = collect(loader)
    path, opened = beton / "train.beton", beton / "opened"
    size = path.stat().st_size
    path.rename(opened)
    path.write_bytes(bytes(size))
    for ours, theirs in zip(collect(loader), before, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
    batches = loader.batches()
    next(batches)
    os.truncate(opened, 5000)
    with pytest.raises(ShardError, match=r"train\.beton: now has 5,000 bytes instead of .* copy it again"):
        list(batches)
    loader.close()


@pytest.mark.parametrize("name", [pipeline("native"), "torchvision", pipeline("dali")])
def test_a_tar_that_is_overwritten_is_named(name: str, tars: Path) -> None:
    """By one of the same layout: old labels with new images."""
    loader = load(tars, name)
    path = tars / "train-000001.tar"
    status = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(512))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ShardError, match=r"train-000001\.tar: was changed while it was in use"):
        list(loader.batches())
    loader.close()


SETTINGS = ("train.epochs=1", "train.accumulate=2", "data.batch_size_per_gpu=2")


@pytest.fixture(scope="module")
def stopped(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a run that a signal stopped after step 2."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        stop_after(2, patched)
        assert main(arguments(shard_set, run, *SETTINGS)) == 130
    return saved(run)


def saved(run: Path) -> dict[str, Any]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


@pytest.mark.parametrize("lost", ["before the step", "in its middle"])
def test_training_that_loses_its_shard_is_saved(
    lost: str,
    stopped: dict[str, Any],
    beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It ends with one line, and with the checkpoint of the last finished step; the first half of another one, which
    has moved the batch-norm statistics, is undone."""
    take, calls = TrainingStep._next_batch, 0

    def take_and_cut(step: TrainingStep, *rest: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == (5 if lost == "before the step" else 6):  # two make a step
            os.truncate(beton / "train.beton", 5000)
        return take(step, *rest)

    monkeypatch.setattr(TrainingStep, "_next_batch", take_and_cut)
    assert main(arguments(beton, tmp_path / "run", *SETTINGS)) == 2
    said = capsys.readouterr()
    assert "train.beton: now has 5,000 bytes" in said.err and "Traceback" not in said.err
    assert "the data failed after step 2, which is saved" in said.out
    found = saved(tmp_path / "run")
    assert found["cursor"] == stopped["cursor"] and found["cursor"]["step"] == 2
    assert all(torch.equal(value, stopped["model"][name]) for name, value in found["model"].items())


def files_of(directory: Path) -> Iterator[Path]:
    yield from sorted(path for path in directory.iterdir() if path.name.startswith(("train", "manifest", "quar")))


@pytest.mark.parametrize("kind", SPECIAL_FILES)
@pytest.mark.parametrize("format", ["beton", "tar"])
def test_special_files(format: str, kind: str, tiny_sets: dict[str, Path], tmp_path: Path) -> None:
    """Each file of a set in turn: verify names it, and no reader waits for it, reads on without end or fails
    otherwise."""
    directory = Path(shutil.copytree(tiny_sets[format], tmp_path / "set"))
    for path in files_of(directory):
        content = path.read_bytes()
        path.unlink()
        SPECIAL_FILES[kind](path)
        if path.name == "manifest.json":
            for read in (read_manifest, survey, lambda at: list(verify(at)), lambda at: open_split(at, "train")):
                with pytest.raises(ShardError):
                    read(directory)
        else:
            assert path.name in {problem.file for problem in verify(directory, decode=True)}, path.name
            assert verify_main([str(directory), "--quick"]) in (0, 1)
            for read in (survey, lambda at: open_split(at, "train")):
                try:
                    read(directory)
                except ShardError as error:
                    assert str(error).startswith((f"{path}: ", f"{path.with_suffix('.tar')}: "))
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
        path.write_bytes(content)
    assert list(verify(directory)) == []


def change_class(raw: dict[str, Any], name: object) -> None:
    raw["classes"][0] = name


HOSTILE = {
    "lone surrogate as class": lambda raw: change_class(raw, "\ud800"),
    "lone surrogate elsewhere": lambda raw: raw.update(source="a\udfff\ud800"),
    "number as class": lambda raw: change_class(raw, 7),
    "classes a text": lambda raw: raw.update(classes="abc"),
    "a count of 2^70": lambda raw: raw["splits"]["train"].update(num_quarantined=2**70),
    "a negative count": lambda raw: raw["splits"]["train"].update(num_kept=-1),
    "a fraction as count": lambda raw: raw["splits"]["train"].update(num_kept=1.5),
    "infinity": lambda raw: raw["splits"]["train"].update(num_kept=float("inf")),
    "NaN": lambda raw: raw["splits"]["train"].update(num_samples=float("nan")),
    "true as count": lambda raw: raw["splits"]["train"]["files"][0].update(num_samples=True),
    "hashed from before the file": lambda raw: raw["splits"]["train"]["files"][0].update(hashed_from=-1),
    "deep nesting": lambda raw: raw["encode"].update(a=deep(200)),
    "deeper nesting": lambda raw: raw["encode"].update(a=deep(700)),
    "a version nested deeply": lambda raw: raw.update(schema_version=deep(700)),
    "a version that is a text": lambda raw: raw.update(schema_version="3" * 10_000),
    "a version of 3.0": lambda raw: raw.update(schema_version=3.0),
    "an orientation that there is not": lambda raw: raw["encode"].update(exif="sideways"),
    "a long orientation": lambda raw: raw["encode"].update(exif="a" * 20_000),
    "a size that is a text": lambda raw: raw["encode"].update(max_side="500"),
    "a long file name": lambda raw: raw["splits"]["train"]["files"][0].update(name="a" * 10_000 + ".beton"),
    "a file of another format": lambda raw: raw["splits"]["train"]["files"][0].update(name="train.crc32"),
    "splits a list": lambda raw: raw.update(splits=[]),
    "NaN as share": lambda raw: raw.update(origin=origin(val_share=float("nan"))),
    "a seed of 2^70": lambda raw: raw.update(origin=origin(val_seed=2**70)),
    "a place that is a number": lambda raw: raw.update(origin=origin(places={"train": 3})),
}


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def origin(**changes: object) -> dict[str, Any]:
    return {"places": {"train": "train/"}, "left_out": [], "val_share": 0.5, "val_seed": 0, **changes}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(name: str, shard_set: Path, tmp_path: Path) -> None:
    """With a checksum that fits: refused in one short line, which names the file."""
    for path in shard_set.iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).symlink_to(path)
    raw = json.loads((shard_set / "manifest.json").read_text())
    HOSTILE[name](raw)
    write_manifest(tmp_path, raw)
    with pytest.raises(ShardError) as caught:
        list(verify(tmp_path, quick=True))
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'manifest.json'}: ") and "\n" not in line and len(line) < 600


@pytest.mark.parametrize("line", ["[" * 100_000, '{"split": 1, "file": "a", "reason": "b"}', "9" * 5000, "[1, 2]"])
def test_hostile_quarantines(line: str, tiny_sets: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_sets["beton"], tmp_path / "set"))
    (directory / "quarantine.jsonl").write_text(line)
    raw = json.loads((directory / "manifest.json").read_text())
    write_manifest(directory, {**raw, "quarantine_sha256": hashlib.sha256(line.encode()).hexdigest()})
    with pytest.raises(ShardError, match=r"quarantine\.jsonl: line 1: not a JSON object with split, file and reason"):
        survey(directory)
    assert [problem.file for problem in verify(directory)] == ["quarantine.jsonl"]


def test_a_hostile_list_of_samples_is_checked_before_it_is_read(tars: Path) -> None:
    """Of many more samples than its tar holds: its size alone says so."""
    path = tars / "train-000000.samples"
    os.truncate(path, 24 << 36)
    with pytest.raises(ShardError, match="lists more samples than"):
        open_split(tars, "train")
