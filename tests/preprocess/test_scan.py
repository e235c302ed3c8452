from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path

import numpy as np
import pytest

import sdpnet.preprocess.sources.scan
from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.flags.sources import add_source_arguments
from sdpnet.preprocess.sources.scan import scan, scan_arguments


def make(root: Path, *files: str) -> Path:
    """Empty files: scan reads none whose name says that it is an image."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def paths(split: sdpnet.preprocess.sources.scan.SplitScan) -> list[str]:
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


def test_class_folders_alone_are_a_train_split(tmp_path):
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    assert list(scan(tmp_path).splits) == ["train"]


def test_explicit_folders_override(tmp_path):
    make(tmp_path, "s/train/a/1.jpg", "s/val/a/2.jpg", "t/a/3.jpg", "v/a/4.jpg")
    found = scan(tmp_path / "s", val=tmp_path / "v")
    assert [paths(split) for split in found.splits.values()] == [["a/1.jpg"], ["a/4.jpg"]]
    found = scan(None, train=tmp_path / "t", val=tmp_path / "t")
    assert [paths(split) for split in found.splits.values()] == [["a/3.jpg"], ["a/3.jpg"]]


def test_other_files_are_counted_by_kind(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/a/notes.txt", "train/a/more/2.jpg", "train/list.csv", "train/stray.jpg")
    make(tmp_path, "train/a/.hidden.jpg", "train/.git/x.jpg", "train/.DS_Store")
    found = scan(tmp_path)
    assert paths(found.splits["train"]) == ["a/1.jpg", "a/more/2.jpg"]
    assert {entry.kind: (entry.count, entry.example) for entry in found.origin.left_out} == {
        "empty files": (2, "train/a/notes.txt"),
        "files in hidden folders": (1, "train/.git/x.jpg"),
        "files of macOS metadata": (1, "train/.DS_Store"),
        "hidden files": (1, "train/a/.hidden.jpg"),
        "images beside the class folders, in none of them": (1, "train/stray.jpg"),
    }


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
        (("train/a/1.jpg", "train/b/notes.txt"), r"train/b: a class folder without images .* such as b/notes\.txt\)"),
        (("train/a/1.jpg", "train/b/more/x.txt"), r"train/b: a class folder without images .* b/more/x\.txt\)"),
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
    with pytest.raises(UserError, match="file: not a folder, nor a tar archive"):
        scan(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a folder, nor a tar archive"):
        scan(tmp_path / "pipe")
    with pytest.raises(UserError, match="--source or --train"):
        scan(None, val=tmp_path / "train")


def flat(tmp_path: Path) -> Path:
    """Val images without class folders, as the official archive has them."""
    return make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/1.JPEG", "val/2.JPEG", "val/3.JPEG", "val/list.txt")


def labelled(split: sdpnet.preprocess.sources.scan.SplitScan) -> list[tuple[str, str]]:
    return [(split.classes[label], path) for label, path in zip(split.labels, paths(split), strict=True)]


def test_val_images_without_class_folders(tmp_path):
    (flat(tmp_path) / "labels.csv").write_text("1,b\n2,a\n3,b\n")
    found = scan(tmp_path, val_labels=tmp_path / "labels.csv")
    val = found.splits["val"]
    assert labelled(val) == [("a", "2.JPEG"), ("b", "1.JPEG"), ("b", "3.JPEG")]
    assert val.labels.dtype == np.int32
    assert [(entry.count, entry.example) for entry in val.left_out] == [(1, "list.txt")]
    assert val.locate(0).path == str(tmp_path / "val" / "2.JPEG")
    elsewhere = scan(None, train=tmp_path / "train", val=tmp_path / "val", val_labels=tmp_path / "labels.csv")
    assert labelled(elsewhere.splits["val"]) == labelled(val)


def test_labels_beside_the_val_images(tmp_path):
    flat(tmp_path)
    (tmp_path / "val.txt").write_text("1.JPEG 1\n2.JPEG 0\n3.JPEG 1\n")
    assert labelled(scan(tmp_path).splits["val"]) == [("a", "2.JPEG"), ("b", "1.JPEG"), ("b", "3.JPEG")]
    rows = "1,a 1 2 3 4\n2,a 1 2 3 4 a 1 2 3 4\n3,b 1 2 3 4\n"
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    with pytest.raises(UserError, match=r"val\.txt and LOC_val_solution\.csv beside it may have the labels; choose"):
        scan(tmp_path)
    found = scan(tmp_path, val_labels=tmp_path / "LOC_val_solution.csv")
    assert labelled(found.splits["val"]) == [("a", "1.JPEG"), ("a", "2.JPEG"), ("b", "3.JPEG")]
    (tmp_path / "val.txt").unlink()
    assert labelled(scan(tmp_path).splits["val"]) == labelled(found.splits["val"])


def test_labels_that_have_nothing_to_label(tmp_path):
    make(tmp_path, "s/train/a/1.jpg", "s/val/a/2.jpg", "t/a/1.jpg", "s/val.txt", "labels.txt")
    assert paths(scan(tmp_path / "s").splits["val"]) == ["a/2.jpg"]  # val.txt, empty, is not needed
    with pytest.raises(UserError, match=r"val: its images are in class folders, .* omit --val-labels"):
        scan(tmp_path / "s", val_labels=tmp_path / "labels.txt")
    with pytest.raises(UserError, match=r"labels\.txt: labels, but there are no val images; name them with --val"):
        scan(tmp_path / "t", val_labels=tmp_path / "labels.txt")


def test_without_labels_the_remedies_are_named(tmp_path):
    with pytest.raises(UserError, match=r"val: 3 images, but no class folders and no labels; sort them") as c:
        scan(flat(tmp_path))
    for remedy in ("--val-labels FILE", "ILSVRC2012_devkit_t12.tar.gz", "LOC_val_solution.csv", "'FILE CLASS'"):
        assert remedy in str(c.value)
    with pytest.raises(UserError, match="val: 3 images, but no class folders; sort them into"):
        scan(None, train=tmp_path / "val")


def test_folders_come_before_archives_of_the_same_split(tmp_path):
    make(tmp_path, "train/a/1.jpg", "val/a/2.jpg", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    assert [paths(split) for split in scan(tmp_path).splits.values()] == [["a/1.jpg"], ["a/2.jpg"]]
    with pytest.raises(UserError, match=r"x: has ILSVRC2012_img_val\.tar but no train/; name the training images"):
        scan(make(tmp_path / "x", "ILSVRC2012_img_val.tar", "test/a/1.jpg"))


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *_): ...

    monkeypatch.setattr("sdpnet.preprocess.sources.listing.tempfile.TemporaryFile", Full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); set TMPDIR to a folder"):
        scan(make(tmp_path, "a/1.jpg"))


def test_arguments(tmp_path):
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    make(tmp_path, "s/train/a/1.jpg", "v/a/2.jpg")
    found = scan_arguments(parser.parse_args(["--source", str(tmp_path / "s"), "--val", str(tmp_path / "v")]))
    assert [paths(split) for split in found.splits.values()] == [["a/1.jpg"], ["a/2.jpg"]]


def test_exports():
    assert sorted(sdpnet.preprocess.sources.scan.__all__) == [
        "Location",
        "Scan",
        "SplitScan",
        "scan",
        "scan_arguments",
    ]
