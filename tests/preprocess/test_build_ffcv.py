from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.preprocess.build_ffcv import main
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.verify import verify

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "preprocess" / "build_ffcv.py"


def command(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does, from another folder and without the checkout on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False, **options
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the command, which must end in one line on stderr and status 2; returns the line."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def small(root: Path, *, val: bool = True) -> Path:
    """Two classes of two tiny images, for tests that break them."""
    for split in ("train", "val")[: 1 + val]:
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                path = root / split / name / f"{number}.jpg"
                path.write_bytes(encode_image(b"P5 8 8 255\n" + bytes([number] * 64), EncodeSettings()).data)
    return root


def test_every_image_is_there_in_order(image_folder, shard_set):
    found = scan(image_folder)
    for name, split in found.splits.items():
        manifest, reader = open_split(shard_set, name)
        assert reader.num_samples == split.num_images
        assert np.array_equal(reader.labels, split.labels)
        for index in range(split.num_images):
            expected = encode_image(split.locate(index).path, EncodeSettings())
            assert reader.encoded(index).tobytes() == expected.data
            assert tuple(reader.sizes[index]) == (expected.height, expected.width)
    assert manifest.classes == found.classes
    assert manifest.source == image_folder.name
    stored = {"max_side": 500, "quality": 90, "subsampling": "4:2:0", "restart_rows": 1}
    assert manifest.encode == {**stored, "reencode": "always", "exif": "ignore"}
    assert sorted(os.listdir(shard_set)) == ["manifest.json", "train.beton", "train.crc32", "val.beton", "val.crc32"]


def test_the_script_converts_and_accounts_for_every_image(image_folder, tmp_path):
    options = ("--max-side", 64, "--quality", 80, "--workers", 1)
    done = command(SCRIPT, "--source", image_folder, "--out", "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    sizes = {name: (tmp_path / "out" / f"{name}.beton").stat().st_size for name in ("train", "val")}
    assert f"train: 24 images found, 24 converted, {sizes['train']:,} bytes" in done.stdout
    assert f"val:   10 images found, 10 converted, {sizes['val']:,} bytes" in done.stdout
    assert "34 images in" in done.stdout and "images/s" in done.stdout
    manifest, reader = open_split(tmp_path / "out", "train")
    assert manifest.encode["max_side"] == 64 and manifest.encode["quality"] == 80
    assert reader.sizes.max() == 64


@pytest.mark.parametrize("start", [[SCRIPT], ["-m", "sdpnet.preprocess.build_ffcv"]])
def test_starts_as_a_file_and_as_a_module(start):
    done = command(*start, "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--source" in done.stdout


def test_as_a_file_it_shadows_nothing():
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.argv = ['build_ffcv', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('scan') is None and importlib.util.find_spec('encode') is None\n"
    )
    done = command("-c", code, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


def test_the_same_folder_as_both_splits(image_folder, tmp_path):
    train = image_folder / "train"
    assert main(["--train", str(train), "--val", str(train), "--out", str(tmp_path)]) == 0
    manifest = read_manifest(tmp_path)
    assert manifest.source == "train"
    assert manifest.splits["train"].files[0].sha256 == manifest.splits["val"].files[0].sha256


def test_the_source_is_named_without_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(small(tmp_path / "pets", val=False))
    assert main(["--source", ".", "--out", "../out"]) == 0
    assert read_manifest("../out").source == "pets"
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_an_existing_shard_set_is_kept(shard_set, image_folder, capsys):
    before = {name: (shard_set / name).stat().st_mtime_ns for name in os.listdir(shard_set)}
    error = fails(capsys, "--source", image_folder, "--out", shard_set)
    assert "already holds a shard set; remove it, or choose another --out" in error
    assert {name: (shard_set / name).stat().st_mtime_ns for name in os.listdir(shard_set)} == before


def test_a_foreign_beton_file_is_kept(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "val.beton").write_text("somebody's")
    error = fails(capsys, "--source", small(tmp_path / "in"), "--out", tmp_path / "out")
    assert "val.beton: exists already" in error
    assert os.listdir(tmp_path / "out") == ["val.beton"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_text("no picture"), "not an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "damaged image .*truncated"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "cannot be read"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_image_is_named_and_leaves_nothing(tmp_path, capsys, split, damage, reason):
    bad = small(tmp_path / "in") / split / "b" / "1.jpg"
    damage(bad)
    assert main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith(f"error: {bad}: ")
    assert re.search(reason, errors[-1])
    assert set(os.listdir(tmp_path / "out")) == {".unfinished"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "gone", "--out", "out"], "gone: no such folder"),
        (["--source", "in", "--out", "in/train/a/0.jpg"], "0.jpg/.unfinished: cannot be written (Not a directory)"),
        (["--source", "in", "--out", "out", "--val", "gone"], "gone: no such folder"),
        (["--source", "in", "--out", "out", "--workers", "0"], "--workers 0: must be 1 to 512"),
        (["--source", "in", "--out", "out", "--quality", "101"], "quality 101: must be 1 to 100"),
        (["--source", "in", "--out", "out", "--max-side", "-5"], "max_side -5"),
        (["--out", "out"], "--source or --train"),
        (["--source", "empty", "--out", "out"], "empty: no class folders"),
        (["--source", "hollow", "--out", "out"], "hollow/b: a class folder without images"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    small(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "in" / "train" / "a", tmp_path / "hollow" / "a")
    (tmp_path / "hollow" / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--souce", "in", "--out", "out"], ["--source", "in"], ["--out", "o", "--work", "1"]]
)
def test_unknown_and_missing_flags(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "build_ffcv: error:" in capsys.readouterr().err


def test_bad_images_are_left_out_and_listed(image_folder, tmp_path, capsys):
    """With `--on-bad skip` every image is in the shard, in its place and with its label, or in the quarantine."""
    source = tmp_path / "source"
    shutil.copytree(image_folder, source)
    bad = {"train/ant/000.JPEG": b"", "train/cow/zzz.jpg": b"no image", "val/bee/1_cut.jpg": None}
    for name, content in bad.items():
        good = next((image_folder / "val" / "ant").glob("*.jpg")).read_bytes()
        (source / name).write_bytes(good[: len(good) // 2] if content is None else content)
    command_line = ["--source", str(source), "--out", str(tmp_path / "out"), "--workers", "3"]
    assert main(command_line) == 2
    assert "000.JPEG" in capsys.readouterr().err and not (tmp_path / "out" / "manifest.json").exists()
    assert main([*command_line, "--on-bad", "skip"]) == 0
    output = capsys.readouterr().out
    assert "26 images found, 24 converted, 2 bad" in output and "11 images found, 10 converted, 1 bad" in output
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [f"{entry['split']}/{entry['file']}" for entry in listed] == list(bad)
    for entry, reason in zip(listed, ("empty", "not an image", "damaged"), strict=True):
        assert reason in entry["reason"] and str(tmp_path) not in entry["reason"]
    found = scan(source)
    for name, split in found.splits.items():
        manifest, reader = open_split(tmp_path / "out", name)
        kept = [i for i in range(split.num_images) if f"{name}/{split.relative_path(i)}" not in bad]
        assert reader.num_samples == len(kept) and np.array_equal(reader.labels, split.labels[kept])
        assert manifest.splits[name].num_quarantined == split.num_images - len(kept)
        for sample, index in enumerate(kept):
            assert reader.encoded(sample).tobytes() == encode_image(split.locate(index).path, EncodeSettings()).data
    assert list(verify(tmp_path / "out", decode=True)) == []


def test_a_split_of_bad_images_only_is_an_error(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "source" / split / "ant").mkdir(parents=True)
        (tmp_path / "source" / split / "ant" / "1.jpg").write_text("no image")
    arguments = ["--source", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--on-bad", "skip"]
    assert main(arguments) == 2
    assert (
        "none of its 1 images can be converted" in capsys.readouterr().err
        and not (tmp_path / "out" / "manifest.json").exists()
    )
