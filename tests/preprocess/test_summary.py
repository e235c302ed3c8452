"""What the build commands say of a source, and what of it is in the manifest and the description of the set."""

from __future__ import annotations

import json
import re
import shutil
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from conversion import write_manifest

from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME, read_manifest
from sdpnet.pipelines.shards.origin import LeftOut, Origin
from sdpnet.preprocess import build_dali, build_ffcv
from sdpnet.preprocess import describe as report
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.preprocess.verify import verify

COMMANDS = [pytest.param(build_ffcv.main, id="ffcv"), pytest.param(build_dali.main, id="dali")]
CONTROL = "\x1b[2J\n.txt"


def small(root: Path, *folders: str, number: int = 3) -> Path:
    """Folders of tiny JPEGs."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for name in range(number):
            content = encode_image(b"P5 8 8 255\n" + bytes([name] * 64), EncodeSettings()).data
            (root / folder / f"{name}.jpg").write_bytes(content)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def convert(capsys: pytest.CaptureFixture[str], *arguments: object, command=build_ffcv.main, status: int = 0) -> str:
    assert command([*map(str, arguments), "--workers", "1"]) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err.splitlines()[-1]


def test_every_file_is_in_the_summary(tmp_path, capsys):
    source = small(tmp_path / "s", "train/a", "train/b", "valid/a", "test/a")
    (source / "train/a/bad.jpg").write_text("no image")
    for name in ("train/a/x.txt", "train/b/y.txt", f"train/b/{CONTROL}", ".DS_Store"):
        (source / name).write_text("text")
    out = tmp_path / "out"
    told = convert(capsys, "--source", source, "--out", out, "--on-bad", "skip")
    assert re.search(r"train: 7 images found, 6 converted, 1 bad \(\S+ says why\), [\d,]+ bytes, from train/", told)
    assert re.search(r"val:   3 images found, 3 converted, [\d,]+ bytes, from valid/", told)
    assert "17 files found = 9 converted + 1 bad + 7 left out" in told
    assert "files of test/, which is no split: 3, such as test/a/0.jpg" in told
    assert ".txt files: 3, such as train/a/x.txt" in told and "files of macOS metadata: 1, .DS_Store" in told
    assert "\x1b" not in told and "no val split" not in told
    assert sum(path.is_file() for path in source.rglob("*")) == 17
    assert list(verify(out, decode=True)) == []
    assert read_manifest(out).origin == Origin(
        {"train": "train/", "val": "valid/"},
        (
            LeftOut(".txt files", 3, "train/a/x.txt"),
            LeftOut("files of test/, which is no split", 3, "test/a/0.jpg"),
            LeftOut("files of macOS metadata", 1, ".DS_Store"),
        ),
    )
    assert report.main([str(out), "--images", "0"]) == 0
    page = (out / "report.html").read_text()
    for text in (capsys.readouterr().out, page):
        assert "No image was left out" not in text
        assert "1 image of the source left out. 7 other files of the source left out." in text
        assert "files of test/, which is no split: 3, such as test/a/0.jpg" in text
        assert "train from train/, val from valid/" in text


def test_a_manifest_of_before_is_read_and_an_ordinary_one_is_as_before(image_folder, tmp_path, capsys):
    told = convert(capsys, "--source", image_folder, "--out", tmp_path / "out")
    assert "34 files found = 34 converted + 0 bad + 0 left out" in told and "other files" not in told
    raw = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    places = {"train": "train/", "val": "val/"}
    assert raw.pop("origin") == {"left_out": [], "places": places, "val_seed": 0, "val_share": None}
    assert sorted(raw) == sorted(
        "checksum classes created_by encode quarantine_sha256 schema_version source splits".split()  # noqa: SIM905
    )
    write_manifest(tmp_path / "out", raw)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.origin is None and manifest.to_json() == (tmp_path / "out" / MANIFEST_NAME).read_text()
    assert report.main([str(tmp_path / "out"), "--images", "0"]) == 0
    assert "No image was left out." in capsys.readouterr().out
    for origin in ({}, [], {"places": {}}, {"places": [], "left_out": [], "val_share": None, "val_seed": 0}):
        write_manifest(tmp_path / "out", {**raw, "origin": origin})
        with pytest.raises(ShardError, match="incomplete or damaged"):
            read_manifest(tmp_path / "out")


@pytest.mark.parametrize("test", [False, True])
def test_without_val_the_remedies_are_said_before_and_after_the_work(tmp_path, capsys, test):
    source = small(tmp_path / "s", *(("train/a", "train/b", "test/a") if test else ("a", "b")))
    told = convert(capsys, "--source", source, "--out", tmp_path / "out")
    first, last = told.split("classes\n")
    for text in (first, last):
        assert "no val split" in text and "--val FOLDER" in text and "--val-share 0.05" in text
    assert (f"--val {source / 'test'}" in first) == test
    with pytest.raises(ShardError, match=r"no split 'val'; .* convert again with --val FOLDER or --val-share 0\.05"):
        open_split(tmp_path / "out", "val")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_share_of_train_becomes_val(tmp_path, capsys, command):
    source = small(tmp_path / "s", "a", "b", number=10)
    arguments = ["--source", source, "--val-share", "0.2", "--val-seed", "5"]
    told = convert(capsys, *arguments, "--out", tmp_path / "out", command=command)
    assert "train: 16 images found, 16 converted" in told and "val:   4 images found, 4 converted" in told
    assert "drawn from train (share 0.2, seed 5)" in told and "20 files found = 20 converted" in told
    assert "no val split" not in told
    for number in (1, 2):
        convert(capsys, *arguments, "--out", tmp_path / "parts", "--part", f"{number}/2", command=command)
    merged = convert(capsys, "--merge", "--out", tmp_path / "parts", command=command)
    assert "drawn from train (share 0.2, seed 5)" in merged and "20 files found = 20 converted" in merged
    assert contents(tmp_path / "parts") == contents(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.origin is not None and manifest.origin.val_share == 0.2 and manifest.origin.val_seed == 5


@pytest.mark.parametrize(
    ("other", "part"),
    [(["--val-share", "0.3"], False), ([], True), (["--val-share", "0.2", "--val-seed", "1"], True)],
)
def test_a_run_with_another_share_does_not_go_on(tmp_path, capsys, other, part):
    source = small(tmp_path / "s", "a", "b", number=10)
    (source / "b" / "9.jpg").write_text("no image")
    out = ["--out", tmp_path / "out", *(["--part", "2/2"] if part else [])]
    assert "b/9.jpg" in convert(capsys, "--source", source, "--val-share", "0.2", *out, status=2)
    error = convert(capsys, "--source", source, *other, *out, "--on-bad", "skip", status=2)
    assert "an unfinished conversion with another --val-share or --val-seed lies here" in error
    convert(capsys, "--source", source, "--val-share", "0.2", *out, "--on-bad", "skip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val-share", "1.5"], "--val-share 1.5: must be above 0 and below 1"),
        (["--val-share", "nan"], "--val-share nan: must be above 0"),
        (["--val-seed", "3"], "--val-seed 3: --val-share is not given; add it, or omit --val-seed"),
        (["--val-share", "0.5", "--val-seed", "-1"], "--val-seed -1: must be 0 to"),
        (["--val-share", "0.001"], "--val-share 0.001: draws none of 6 images; give a larger share"),
    ],
)
def test_wrong_shares(tmp_path, capsys, arguments, message):
    source = small(tmp_path / "s", "a", "b")
    assert message in convert(capsys, "--source", source, "--out", tmp_path / "out", *arguments, status=2)
    assert not (tmp_path / "out").exists()


def test_a_share_where_val_is_given(tmp_path, capsys):
    source = small(tmp_path / "s", "train/a", "val/a")
    for val in ([], ["--val", source / "val"]):
        arguments = ["--source", source, "--out", tmp_path / "out", *val, "--val-share", "0.5"]
        assert "is already the val split; omit --val-share" in convert(capsys, *arguments, status=2)
    merge = ["--merge", "--out", tmp_path / "out", "--val-share", "0.5"]
    assert "--val-share with --merge: the parts already have a source" in convert(capsys, *merge, status=2)


@pytest.mark.parametrize(("folder", "part"), [("shards", True), ("a/shards", False), ("new/deep/shards", False)])
def test_a_run_into_the_source_goes_on(tmp_path, capsys, folder, part):
    """The first run ends at a bad image; its unfinished work is not part of what the second one sees."""
    source = small(tmp_path / "s", "a", "b", number=4)
    (source / "b" / "3.jpg").write_text("no image")
    convert(capsys, "--source", source, "--out", tmp_path / "whole", "--on-bad", "skip")
    out = source / folder
    many = [["--part", f"{number}/2"] for number in (1, 2)] if part else [[]]
    assert "b/3.jpg" in convert(capsys, "--source", source, "--out", out, *many[-1], status=2)
    assert (out / ".unfinished").is_dir()
    for flags in many:
        convert(capsys, "--source", source, "--out", out, *flags, "--on-bad", "skip")
    if part:
        convert(capsys, "--merge", "--out", out)
    assert contents(out) == contents(tmp_path / "whole")
    told = convert(capsys, "--source", source, "--out", tmp_path / "again", "--on-bad", "skip")
    assert "8 images found, 7 converted" in told and f"files of shard sets: 4, such as {folder}/manifest.json" in told


def test_a_shard_set_among_the_images_of_a_class_does_not_hide_them(tmp_path, capsys):
    source = small(tmp_path / "s", "a", "b")
    convert(capsys, "--source", source, "--out", tmp_path / "first")
    for path in (tmp_path / "first").iterdir():
        path.rename(source / "a" / path.name)
    (source / "b" / "manifest.json").write_text("{}")  # somebody's
    told = convert(capsys, "--source", source, "--out", tmp_path / "out")
    assert "6 images found, 6 converted" in told and "10 files found = 6 converted + 0 bad + 4 left out" in told
    assert "files of shard sets: 3, such as a/manifest.json" in told and ".json files: 1, b/manifest.json" in told


def test_names_that_the_terminal_cannot_show(tmp_path, capsys, monkeypatch):
    source = small(tmp_path / "s", "a", "b")
    (source / "a" / "\u732b.txt").write_text("text")
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="latin-1"))
    assert build_ffcv.main(["--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    sys.stdout.flush()
    assert b".txt files: 1, a/\\u732b.txt" in sys.stdout.buffer.getvalue()


def test_a_file_that_comes_between_two_runs_does_not_stop_the_second(tmp_path, capsys):
    source = small(tmp_path / "s", "a", "b")
    (source / "b" / "2.jpg").write_text("no image")
    convert(capsys, "--source", source, "--out", tmp_path / "out", status=2)
    (source / "notes.txt").write_text("text")
    told = convert(capsys, "--source", source, "--out", tmp_path / "out", "--on-bad", "skip")
    assert "7 files found = 5 converted + 1 bad + 1 left out" in told
    shutil.rmtree(tmp_path / "out")
