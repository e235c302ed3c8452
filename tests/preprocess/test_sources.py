"""Sources as people have them: which folder becomes which split, and that every file of them is accounted for."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.encoding.encode import EncodeSettings
from sdpnet.preprocess.sources.files.links import LOOPS, NOWHERE
from sdpnet.preprocess.sources.scan import Scan, scan
from sdpnet.preprocess.workers.child import encode_one
from sdpnet.preprocess.workers.result import Bad


def encoded(format: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(file, format)
    return file.getvalue()


JPEG = encoded("JPEG")


def make(root: Path, *files: str) -> Path:
    """JPEG images, but for files with the suffixes of texts; "NAME -> TARGET" is a symbolic link."""
    for file in files:
        name, _, target = file.partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        else:
            path.write_bytes(b"some text" if name.endswith((".txt", ".csv", ".json", ".xml")) else JPEG)
    return root


def names(found: Scan) -> dict[str, list[str]]:
    return {
        name: [split.relative_path(index) for index in range(split.num_images)] for name, split in found.splits.items()
    }


def num_files(root: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(root))


def num_accounted(found: Scan) -> int:
    return sum(split.num_images for split in found.splits.values()) + found.origin.num_left_out


def left_out(found: Scan) -> dict[str, tuple[int, str]]:
    return {entry.kind: (entry.count, entry.example) for entry in found.origin.left_out}


@pytest.mark.parametrize(
    ("folders", "train", "val", "unused"),
    [
        (("train", "val"), "train/", "val/", ()),
        (("train", "valid"), "train/", "valid/", ()),
        (("train", "validation"), "train/", "validation/", ()),
        (("train", "valid", "test"), "train/", "valid/", ("test",)),
        (("train", "val", "test", "extra"), "train/", "val/", ("extra", "test")),
        (("Train", "Val", "Test"), "Train/", "Val/", ("Test",)),
        (("TRAIN", "VALIDATION"), "TRAIN/", "VALIDATION/", ()),
        (("Training", "Testing"), "Training/", None, ("Testing",)),
        (("train", "test"), "train/", None, ("test",)),
        (("train",), "train/", None, ()),
    ],
)
def test_names_of_splits(tmp_path, folders, train, val, unused):
    make(tmp_path, *(f"{folder}/a/{number}.jpg" for number, folder in enumerate(folders)))
    found = scan(tmp_path)
    assert found.origin.places == {"train": train} | ({} if val is None else {"val": val})
    assert names(found)["train"] == ["a/0.jpg"]
    assert names(found).get("val") == (None if val is None else [f"a/{folders.index(val[:-1])}.jpg"])
    assert left_out(found) == {
        f"files of {name}/, which is no split": (1, f"{name}/a/{folders.index(name)}.jpg") for name in unused
    }


def test_test_is_val_where_it_is_named(tmp_path):
    make(tmp_path, "train/a/1.jpg", "valid/a/2.jpg", "test/a/3.jpg")
    found = scan(tmp_path, val=tmp_path / "test")
    assert names(found)["val"] == ["a/3.jpg"] and found.origin.places["val"] == "test/"
    assert left_out(found) == {"files of valid/, which is no split": (1, "valid/a/2.jpg")}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "val", "valid"), "val/ and valid/ may each be the val split; name the right one with --val"),
        (("train", "Val", "validation"), "Val/ and validation/ may each be the val split"),
        (("train", "Train"), "Train/ and train/ may each be the train split; name the right one with --train"),
        (("train", "training"), "train/ and training/ may each be the train split"),
        (("valid",), "has valid/ but no train/; name the training images with --train"),
        (("test",), "has test/ but no train/"),
        (("a", "b", "test"), "has test/ but no train/"),
        (("seg_train", "seg_test"), r"seg_test/ and seg_train/ seem to hold class folders; .* --train \S*seg_train"),
        (("training_set", "test_set"), "test_set/ and training_set/ seem to hold class folders"),
        (("train2017", "val2017"), "train2017/ and val2017/ seem to hold class folders"),
        (
            ("dataset",),
            r"all images lie in folders below its only folder, dataset/; name that in its place: \S*dataset",
        ),
    ],
)
def test_splits_that_are_not_clear(tmp_path, folders, message):
    make(tmp_path, *(f"{folder}/{name}/1.jpg" for folder in folders for name in ("a", "b")))
    with pytest.raises(UserError, match=message):
        scan(tmp_path)


def test_splits_within_train(tmp_path):
    """`train/val/CLASS/` is no class called val, whose images would train the model."""
    make(tmp_path, *(f"train/{name}/1.jpg" for name in ("a", "b", "val/a", "val/b")))
    with pytest.raises(UserError, match=r"train: val/ seems to hold class folders of another split; .* --val \S*val, "):
        scan(tmp_path)
    assert names(scan(tmp_path, val=tmp_path / "train/val"))["train"] == ["a/1.jpg", "b/1.jpg"]
    assert scan(tmp_path, train=tmp_path / "train").classes == ("a", "b", "val")
    make(tmp_path / "flat", "train/valid/1.jpg", "train/test_tube/below/1.jpg")
    assert scan(tmp_path / "flat").classes == ("test_tube", "valid")


def test_val_that_is_train_is_no_val_split(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/2.jpg")
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(UserError, match=r"val/ is a link to the train split, .* --val-share"):
        scan(tmp_path)


@pytest.mark.parametrize("out", ["train", "train/a", "val", "train/a/below"])
def test_the_output_is_no_folder_of_images(tmp_path, out):
    """They would be missing in the shard set without a word."""
    make(tmp_path, "train/a/1.jpg", "train/a/below/2.jpg", "train/b/3.jpg", "val/b/4.jpg")
    with pytest.raises(UserError, match=f"{out}: a folder of the source that has images in it .* choose another --out"):
        scan(tmp_path, out=tmp_path / out)
    assert num_accounted(scan(tmp_path, out=tmp_path)) == 4


def test_a_class_may_be_called_train(tmp_path):
    make(tmp_path, "bus/1.jpg", "train/2.jpg", "test/3.jpg")
    assert scan(None, train=tmp_path).classes == ("bus", "test", "train")
    with pytest.raises(UserError, match="train: 1 images, but no class folders"):
        scan(tmp_path)


def test_folders_below_class_folders_as_imagefolder(tmp_path):
    torchvision = pytest.importorskip("torchvision.datasets")
    files = ["b/2.jpg", "b/day/1.jpg", "b/day-2/0.jpg", "b/day/am/3.jpg", "a/x/y/z/1.jpg", "c/9.jpg", "b/10.jpg"]
    make(tmp_path / "s", *(f"train/{file}" for file in files), "elsewhere/deep/7.jpg")
    (tmp_path / "s" / "train" / "a" / "linked").symlink_to(tmp_path / "s" / "elsewhere")
    train = scan(tmp_path / "s").splits["train"]
    found = [(train.locate(index).path, int(train.labels[index])) for index in range(train.num_images)]
    assert found == torchvision.ImageFolder(tmp_path / "s" / "train").samples
    assert len(found) == len(files) + 1


@pytest.mark.parametrize(
    ("links", "kinds"),
    [
        (["train/a/up -> .."], {LOOPS: 1}),
        (["train/up -> ..", "train/here -> ."], {LOOPS: 2}),
        (["train/a/x/here -> ."], {LOOPS: 1}),
        (["train/a/up -> ../../.."], {LOOPS: 1}),
        (["train/a/x/far -> ../../../../.."], {LOOPS: 1}),
        (["train/a/y -> ../b", "train/b/z -> ../a"], {LOOPS: 2}),
        (["train/a/self -> self"], {NOWHERE: 1}),
        (["train/self -> self", "self -> self", "train/a/p -> q", "train/a/q -> p"], {NOWHERE: 4}),
        (["train/a/below -> 1.jpg/file", f"train/a/long -> {'x' * 300}", "train/a/gone -> gone/x"], {NOWHERE: 3}),
    ],
)
def test_links_without_end_are_left_out_by_name(tmp_path, links, kinds):
    make(tmp_path, "train/a/1.jpg", "train/a/x/2.jpg", "train/b/3.jpg", *links)
    found = scan(tmp_path)
    assert {entry.kind: entry.count for entry in found.origin.left_out} == kinds
    images = names(found)["train"]
    assert images[:3] == ["a/1.jpg", "a/x/2.jpg", "b/3.jpg"] or "a/y/3.jpg" in images
    assert len(images) == (6 if "a/y" in links[0] else 3)


def test_an_image_that_is_a_link_without_end_is_bad(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/a/2.jpg -> 2.jpg", "train/a/3.jpg -> 1.jpg/x")
    train = scan(tmp_path).splits["train"]
    results = [encode_one(train.locate(index), EncodeSettings()) for index in range(train.num_images)]
    assert [result.reason for result in results if isinstance(result, Bad)] == [
        "cannot be read (Too many levels of symbolic links)",
        "cannot be read (Not a directory)",
    ]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "MPO"])
def test_the_first_bytes_decide(tmp_path, format):
    make(tmp_path, "train/a/1.jpg", "train/a/notes", "train/a/notes.jpg?w=100")
    odd = ("8", "9.jpg?w=100", "photo.", "x.JPG ", "y.jpeg_large", "z.txt", "w.dat")
    for name in odd:
        (tmp_path / "train" / "a" / name).write_bytes(encoded(format))
    for name in ("notes", "notes.jpg?w=100"):
        (tmp_path / "train" / "a" / name).write_text("no image\n")
    found = scan(tmp_path)
    assert names(found)["train"] == sorted(["a/1.jpg", *(f"a/{name}" for name in odd)])
    assert left_out(found) == {
        "files without a suffix that are no images": (1, "train/a/notes"),
        "other files that are no images": (1, "train/a/notes.jpg?w=100"),
    }


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
        b"\xff\x0a" + bytes(20),
        b"\0\0\0\x0cJXL \r\n\x87\n",
        b"8BPS\0\x01" + bytes(20),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_an_image_that_cannot_be_decoded_is_listed(tmp_path, content):
    make(tmp_path, "train/a/1.jpg")
    (tmp_path / "train" / "a" / "2").write_bytes(content)
    assert names(scan(tmp_path))["train"] == ["a/1.jpg", "a/2"]


@pytest.mark.parametrize(
    "suffix", ["jpg", "JPEG", "jpe", "jfif", "gif", "mpo", "avif", "heic", "jp2", "png", "tif", "bmp"]
)
def test_a_suffix_of_an_image_is_listed_whatever_is_in_it(tmp_path, suffix):
    make(tmp_path, "train/a/0.jpg")
    (tmp_path / "train" / "a" / f"1.{suffix}").write_text("<html>")
    assert names(scan(tmp_path))["train"] == ["a/0.jpg", f"a/1.{suffix}"]


def test_every_file_is_accounted_for(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/a/sub/2.jpg", "train/b/1", "valid/a/1.jpg", "valid/b/deep/er/2.gif")
    make(tmp_path, "README.dataset.txt", "data.csv", "preview.jpg", "train/loose.jpg", "train/a/labels.json")
    make(tmp_path, "train/.DS_Store", "train/a/._1.jpg", "train/a/Thumbs.db", "__MACOSX/train/a/._1.jpg", ".git/x/y")
    make(tmp_path, "train/a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "train/a/.hidden/9.jpg", "desktop.ini", "Icon\r")
    make(tmp_path, "test/x/1.jpg", "test/notes.txt", "extra/deep/er/1.jpg", "train/b/gone.dat -> nowhere")
    make(tmp_path, "partial/.unfinished/journal.jsonl", "train/b/.unfinished/lock")
    os.mkfifo(tmp_path / "train" / "b" / "pipe.jpg")
    (tmp_path / "train" / "b" / "empty").touch()
    found = scan(tmp_path)
    assert names(found) == {"train": ["a/1.jpg", "a/sub/2.jpg", "b/1"], "val": ["a/1.jpg", "b/deep/er/2.gif"]}
    assert num_accounted(found) == num_files(tmp_path)
    kinds = left_out(found)
    assert kinds["files of test/, which is no split"] == (2, "test/notes.txt")
    assert kinds["files of extra/, which is no split"] == (1, "extra/deep/er/1.jpg")
    assert kinds["images beside the class folders, in none of them"] == (1, "train/loose.jpg")
    assert kinds["images beside the splits, in none of them"] == (1, "preview.jpg")
    assert kinds["files of shard sets"] == (1, "train/b/.unfinished/lock")
    assert kinds["files of macOS metadata"][0] == 4 and kinds["pipes, sockets and devices"][0] == 1


def test_many_kinds_are_counted_to_the_last_file(tmp_path):
    make(tmp_path, "a/1.jpg")
    for number in range(120):
        (tmp_path / "a" / f"{number}.x{number}").write_text("x")
    found = scan(tmp_path)
    assert num_accounted(found) == num_files(tmp_path) and len(found.origin.left_out) < 50


def test_files_that_were_read_for_the_labels(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/images/1.jpg", "val/images/2.jpg", "list.csv")
    (tmp_path / "val" / "val_annotations.txt").write_text("1.jpg\tb\t0\t0\t9\t9\n2.jpg\ta\t0\t0\t9\t9\n")
    found = scan(tmp_path, val_labels=tmp_path / "val" / "val_annotations.txt")  # as in Tiny ImageNet
    assert names(found)["val"] == ["images/2.jpg", "images/1.jpg"]
    assert left_out(found) == {
        ".csv files": (1, "list.csv"),
        "files that were read for the labels": (1, "val/val_annotations.txt"),
    }
    with pytest.raises(UserError, match="val: 2 images in images/, which is no class of train, but no class folders"):
        scan(tmp_path)


@pytest.mark.parametrize(
    "out", ["shards", "new/deep/shards", "train/shards", "train/a/shards", "train/a/x/shards", "."]
)
@pytest.mark.parametrize("split", ["train/", ""])
def test_the_output_is_not_part_of_the_source(tmp_path, out, split):
    source = make(tmp_path / "s", f"{split}a/1.jpg", f"{split}b/1.jpg", f"{split}a/2.jpg")
    before = scan(source, out=source / out)
    make(source, f"{out}/.unfinished/train.spool", f"{out}/.unfinished/part-1-of-2/journal.jsonl")
    after = scan(source, out=source / out)
    assert names(after) == names(before) == {"train": ["a/1.jpg", "a/2.jpg", "b/1.jpg"]}
    assert after.origin == before.origin and after.origin.left_out == ()


def test_val_may_lie_in_the_train_folder(tmp_path):
    make(tmp_path, "a/1.jpg", "b/1.jpg", "holdout/a/2.jpg", "holdout/b/2.jpg")
    for arguments in ((tmp_path, None), (None, tmp_path)):
        found = scan(*arguments, val=tmp_path / "holdout")
        assert found.classes == ("a", "b") and names(found)["val"] == ["a/2.jpg", "b/2.jpg"]
        assert num_accounted(found) == 4


def test_a_folder_of_images_beside_val_images_is_an_error(tmp_path):
    make(tmp_path, "train/a/1.jpg", "val/1.jpg", "val/more/2.jpg")
    (tmp_path / "val.txt").write_text("1.jpg a\n2.jpg a\n")
    with pytest.raises(UserError, match="val: 1 class folder that train does not have, first 'more'"):
        scan(tmp_path)


def test_a_folder_for_detection_is_named(tmp_path):
    make(tmp_path, "train/images/1.jpg", "train/labels/1.txt")
    with pytest.raises(UserError, match=r"train/labels: a class folder without images .* for object detection"):
        scan(tmp_path)


def test_control_characters_in_names(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/a/\x1b[2J\n.txt", "train/\x1b[2Jb/x.txt")
    with pytest.raises(UserError) as caught:
        scan(tmp_path)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
