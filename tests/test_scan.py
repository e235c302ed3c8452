from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import pytest

import preprocess.scan
from pipelines.errors import UserError
from preprocess.scan import add_source_arguments, scan, scan_arguments


def make(root: Path, *files: str) -> Path:
    """Empty files: scan reads none."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def paths(split: preprocess.scan.SplitScan) -> list[str]:
    return [split.relative_path(index) for index in range(split.num_images)]


def test_classes_and_files_are_in_name_order(tmp_path):
    make(tmp_path, "train/b/2.jpg", "train/b/10.jpg", "train/a/z.PNG", "train/C/x.JPEG", "val/b/v.webp", "val/C/v.bmp")
    found = scan(tmp_path)
    assert found.classes == ("C", "a", "b")
    train, val = found.splits["train"], found.splits["val"]
    assert paths(train) == ["C/x.JPEG", "a/z.PNG", "b/10.jpg", "b/2.jpg"]
    assert train.labels.tolist() == [0, 1, 2, 2]
    assert train.labels.dtype == np.int32
    assert paths(val) == ["C/v.bmp", "b/v.webp"]
    assert val.labels.tolist() == [0, 2]
    assert val.locate(1).path == str(tmp_path / "val" / "b" / "v.webp")
    with pytest.raises(IndexError):
        val.relative_path(2)


def test_agrees_with_torchvision(image_folder):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(image_folder / "train")
    found = scan(image_folder)
    assert list(found.classes) == folder.classes
    train = found.splits["train"]
    samples = [(train.locate(index).path, int(train.labels[index])) for index in range(train.num_images)]
    assert samples == folder.samples


def test_val_folder_names(tmp_path):
    make(tmp_path, "train/a/1.jpg", "test/a/2.jpg")
    assert paths(scan(tmp_path).splits["val"]) == ["a/2.jpg"]
    make(tmp_path, "validation/a/3.jpg")
    assert paths(scan(tmp_path).splits["val"]) == ["a/3.jpg"]
    make(tmp_path, "val/a/4.jpg")
    assert paths(scan(tmp_path).splits["val"]) == ["a/4.jpg"]


def test_class_folders_alone_are_a_train_split(tmp_path):
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    assert list(scan(tmp_path).splits) == ["train"]


def test_explicit_folders_override(tmp_path):
    make(tmp_path, "s/train/a/1.jpg", "s/val/a/2.jpg", "t/a/3.jpg", "v/a/4.jpg")
    found = scan(tmp_path / "s", val=tmp_path / "v")
    assert [paths(split) for split in found.splits.values()] == [["a/1.jpg"], ["a/4.jpg"]]
    found = scan(None, train=tmp_path / "t", val=tmp_path / "t")
    assert [paths(split) for split in found.splits.values()] == [["a/3.jpg"], ["a/3.jpg"]]


def test_other_entries_are_counted_and_hidden_ones_are_not(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/a/notes.txt", "train/a/more/2.jpg", "train/list.csv", "train/stray.jpg")
    make(tmp_path, "train/a/.hidden.jpg", "train/.git/x.jpg", "train/.DS_Store")
    train = scan(tmp_path).splits["train"]
    assert paths(train) == ["a/1.jpg"]
    assert train.num_ignored == 4


def test_names_of_any_bytes(tmp_path):
    folder = tmp_path / "train" / "größe"
    folder.mkdir(parents=True)
    with open(os.path.join(os.fsencode(folder), b"\xff\xfe.jpg"), "wb"):
        pass
    make(tmp_path, "train/größe/漢.jpg")
    train = scan(tmp_path).splits["train"]
    assert all(os.path.exists(train.locate(index).path) for index in range(2))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no class folders with images"),
        (("train/notes.txt",), "train: no class folders with images"),
        (("train/a/1.jpg", "train/b/notes.txt"), r"train/b: a class folder without images \(0 folders, 1 other"),
        (("train/a/images/1.jpg",), r"train/a: a class folder without images \(1 folders, 0 other"),
        (("train/a/1.jpg", "val/a/1.jpg", "val/x/1.jpg"), "val: 1 class folder that train does not have, first 'x'"),
        (("train/a/1.jpg", "val/1.jpg", "val/2.jpg"), "val: 2 images, but no class folders"),
        (("val/a/1.jpg",), "has val/ but no train/"),
        (("1.jpg",), "1 images, but no class folders"),
    ],
)
def test_mistakes_are_named(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        scan(make(tmp_path, *files))
    assert "\n" not in str(caught.value)


def test_missing_folders(tmp_path):
    make(tmp_path, "train/a/1.jpg", "file")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        scan(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        scan(tmp_path, val=tmp_path / "nowhere")
    with pytest.raises(UserError, match="file: not a folder"):
        scan(tmp_path / "file")
    with pytest.raises(UserError, match="--source or --train"):
        scan(None, val=tmp_path / "train")


def test_arguments(tmp_path):
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    make(tmp_path, "s/train/a/1.jpg", "v/a/2.jpg")
    found = scan_arguments(parser.parse_args(["--source", str(tmp_path / "s"), "--val", str(tmp_path / "v")]))
    assert [paths(split) for split in found.splits.values()] == [["a/1.jpg"], ["a/2.jpg"]]


def test_exports():
    assert sorted(preprocess.scan.__all__) == [
        "IMAGE_SUFFIXES",
        "Location",
        "Scan",
        "SplitScan",
        "add_source_arguments",
        "scan",
        "scan_arguments",
    ]
