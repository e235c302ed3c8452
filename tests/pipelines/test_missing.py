"""What is said about a path that is no shard set."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from sdpnet import train
from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.loader import make_loader
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.missing import why_no_shard_set


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


FOLDERS = {
    "class folders": ("n01440764/1.JPEG", "n01443537/2.JPEG"),
    "splits of class folders": ("train/ant/1.jpg", "val/ant/1.jpg"),
    "ImageNet's tars": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
    "WebDataset": ("train-0000.tar", "train-0001.tar"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_images_is_to_be_adopted(tmp_path: Path, kind: str) -> None:
    root = touch(tmp_path / "my images", *FOLDERS[kind])
    with pytest.raises(ShardError) as caught:
        open_split(root, "train")
    said = str(caught.value)
    command = f"sdpnet adopt --source {shlex.quote(str(root))} --out SHARDS"
    assert said.startswith(f"{root}: no manifest.json here") and said.endswith(f"to use them where they lie: {command}")


def test_parquet_is_to_be_converted(tmp_path: Path) -> None:
    said = why_no_shard_set(touch(tmp_path, "train-00000-of-00001.parquet"), "manifest.json")
    assert f"sdpnet convert --source {tmp_path} --out SHARDS" in said


def test_a_tar(tmp_path: Path) -> None:
    path = touch(tmp_path, "images.tar") / "images.tar"
    said = why_no_shard_set(path, "manifest.json")
    assert said.endswith(f"to use its images where they lie: sdpnet adopt --train {path} --out SHARDS")


@pytest.mark.parametrize("names", [(), ("readme.txt",), ("a/b.txt", "a/c/d/e.jpg"), ("train/x.npy",)])
def test_other_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    said = why_no_shard_set(touch(tmp_path, *names), "manifest.json")
    assert said == "no manifest.json here, so it is not a shard set (make one with sdpnet convert)"


def test_odd_entries_do_no_harm(tmp_path: Path) -> None:
    root = touch(tmp_path, "locked/1.jpg", "a/1.txt")
    (root / "loop").symlink_to("loop")
    (root / "locked").chmod(0)
    try:
        assert "no manifest.json here" in why_no_shard_set(root, "manifest.json")
    finally:
        (root / "locked").chmod(0o700)


def test_the_command_can_be_pasted(tmp_path: Path) -> None:
    root = touch(tmp_path / "it's; $(odd)", "a/1.jpg")
    command = why_no_shard_set(root, "manifest.json").rpartition(": ")[2]
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert words.stdout.splitlines()[3] == str(root)


def test_all_ways_in_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "images", "train/ant/1.jpg", "val/ant/1.jpg")
    with pytest.raises(ShardError, match="to use them where they lie"):
        make_loader(DataOptions(path=str(root)), AugmentOptions(), "train", ShardOptions(), torch.device("cpu"), seed=0)
    assert train.main(["--config", "debug", "--data", str(root), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "to use them where they lie: sdpnet adopt" in error and error.count("\n") == 1
