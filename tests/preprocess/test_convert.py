from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conversion import convert_folder

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import exclusive
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.pipelines.shards.origin import Origin
from sdpnet.preprocess.conversion.command import encoded_images, plan_conversion
from sdpnet.preprocess.conversion.convert import Image, convert
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.conversion.writers.tar import TarWriter
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.preprocess.sources.scan import Scan, scan
from sdpnet.preprocess.verify import verify
from sdpnet.preprocess.workers.pool import Workers

ROOT = Path(__file__).resolve().parents[2]
WRITERS = [pytest.param(BetonWriter, id="beton"), pytest.param(partial(TarWriter, shard_bytes=60_000), id="tar")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Stop(Exception):
    """What ends a conversion in these tests."""


def convert_until(found: Scan, out: Path, make_writer, at: int, error: BaseException, monkeypatch) -> None:
    """Converts with `error` raised in the place of image `at`, counted through all splits."""
    conversion = plan_conversion(found, "source", EncodeSettings())
    calls = [0]

    def images(split: str, first: int) -> Generator[Image, None, None]:
        for image in encoded_images(found, Workers(EncodeSettings(), 0))(split, first):
            if calls[0] == at:
                raise error
            calls[0] += 1
            yield image

    with pytest.raises(type(error)):
        convert(conversion, images, make_writer, {"writer": str(make_writer)}, out)


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("make_writer", WRITERS)
def test_bytes_do_not_depend_on_the_number_of_workers(image_folder, tmp_path, make_writer, num_workers):
    convert_folder(image_folder, tmp_path / "none", make_writer)
    convert_folder(image_folder, tmp_path / "some", make_writer, num_workers=num_workers)
    assert contents(tmp_path / "some") == contents(tmp_path / "none")


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("make_writer", WRITERS)
@pytest.mark.parametrize("at", [1, 7, 23, 24, 30, 33])  # of 24 training and 10 validation images
def test_what_was_interrupted_goes_on(image_folder, tmp_path, monkeypatch, capsys, make_writer, at, error):
    found = scan(image_folder)
    convert_folder(found, tmp_path / "whole", make_writer)
    convert_until(found, tmp_path / "out", make_writer, at, error, monkeypatch)
    assert os.listdir(tmp_path / "out") == [".unfinished"]
    read = []
    monkeypatch.setattr(
        "sdpnet.preprocess.workers.child.encode_image", lambda *a: read.append(a[2]) or encode_image(*a)
    )
    capsys.readouterr()
    convert_folder(found, tmp_path / "out", make_writer)
    assert len(read) == 34 - at  # nothing is done twice
    assert ("images are done already" in capsys.readouterr().err) == (at != 24)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_interrupted_again_and_again(image_folder, tmp_path, monkeypatch):
    found = scan(image_folder)
    convert_folder(found, tmp_path / "whole", WRITERS[1].values[0])
    for _ in range(11):
        convert_until(found, tmp_path / "out", WRITERS[1].values[0], 3, Stop(), monkeypatch)
    convert_folder(found, tmp_path / "out", WRITERS[1].values[0])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_is_left_where_nothing_was_done(image_folder, tmp_path, monkeypatch):
    convert_until(scan(image_folder), tmp_path / "a" / "b", BetonWriter, 0, Stop(), monkeypatch)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"settings": EncodeSettings(quality=80)}, "other settings"),
        ({"make_writer": TarWriter}, "another kind of output"),
        ({"source": "fewer"}, "other images"),
    ],
)
def test_another_conversion_does_not_go_on_with_it(image_folder, tmp_path, monkeypatch, other, difference):
    found = scan(image_folder)
    convert_until(found, tmp_path / "out", BetonWriter, 5, Stop(), monkeypatch)
    before = contents(tmp_path / "out" / ".unfinished")
    if "source" in other:
        shutil.copytree(image_folder, tmp_path / "fewer")
        next((tmp_path / "fewer" / "train" / "cow").iterdir()).unlink()
        other = {"source": scan(tmp_path / "fewer")}
    arguments = {"source": found, "make_writer": BetonWriter, **other}
    with pytest.raises(UserError, match=f"an unfinished conversion with {difference} lies here; repeat its command"):
        convert_folder(out=tmp_path / "out", **arguments)
    after = contents(tmp_path / "out" / ".unfinished")
    assert after == before
    convert_folder(found, tmp_path / "out")


def test_another_version_of_the_encoder_does_not_go_on_with_it(image_folder, tmp_path, monkeypatch):
    found = scan(image_folder)
    convert_until(found, tmp_path / "out", BetonWriter, 5, Stop(), monkeypatch)
    monkeypatch.setattr("sdpnet.preprocess.conversion.command.codec", lambda: "Pillow 99")
    with pytest.raises(UserError, match="another version of the encoder"):
        convert_folder(found, tmp_path / "out")


def test_two_runs_do_not_mix(image_folder, tmp_path):
    (tmp_path / ".unfinished").mkdir()
    message = f"process {os.getpid()} on .* is writing here"
    with exclusive(tmp_path / ".unfinished" / "lock"), pytest.raises(UserError, match=message):
        convert_folder(image_folder, tmp_path)


def test_a_finished_set_is_kept(image_folder, shard_set, tmp_path):
    before = contents(shard_set)
    with pytest.raises(UserError, match="already holds a shard set; remove it, or choose another --out"):
        convert_folder(image_folder, shard_set)
    assert contents(shard_set) == before


@pytest.mark.parametrize("name", ["val.beton", "train.crc32", "train-000003.tar", "quarantine.jsonl"])
def test_foreign_files_are_kept(image_folder, tmp_path, name):
    (tmp_path / name).write_text("somebody's")
    (tmp_path / "train.txt").write_text("no shard")
    with pytest.raises(UserError, match=f"{name}: exists already"):
        convert_folder(image_folder, tmp_path)
    assert contents(tmp_path) == {name: b"somebody's", "train.txt": b"no shard"}


def bad_folder(image_folder: Path, source: Path) -> dict[str, str]:
    """A copy with three bad images: their names and what is the matter."""
    shutil.copytree(image_folder, source)
    bad = {"train/ant/000.JPEG": "empty", "train/cow/zzz.jpg": "not an image", "val/bee/1_cut.jpg": "damaged"}
    (source / "train/ant/000.JPEG").touch()
    (source / "train/cow/zzz.jpg").write_text("no image")
    good = next((image_folder / "val" / "ant").glob("*.jpg")).read_bytes()
    (source / "val/bee/1_cut.jpg").write_bytes(good[: len(good) // 2])
    return bad


@pytest.mark.parametrize("make_writer", WRITERS)
def test_bad_images_are_left_out_and_listed(image_folder, tmp_path, make_writer):
    """Every image is in the shard, in its place and with its label, or in the quarantine."""
    bad = bad_folder(image_folder, tmp_path / "in")
    found = scan(tmp_path / "in")
    out = tmp_path / "out"
    convert_folder(found, out, make_writer, on_bad="skip")
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [f"{entry['split']}/{entry['file']}" for entry in listed] == list(bad)
    for entry, reason in zip(listed, bad.values(), strict=True):
        assert reason in entry["reason"] and str(tmp_path) not in entry["reason"]
    for name, split in found.splits.items():
        manifest, reader = open_split(out, name)
        kept = [i for i in range(split.num_images) if f"{name}/{split.relative_path(i)}" not in bad]
        assert reader.num_samples == len(kept) and np.array_equal(reader.labels, split.labels[kept])
        assert manifest.splits[name].num_quarantined == split.num_images - len(kept)
        for sample, index in enumerate(kept):
            expected = encode_image(split.locate(index).read(), EncodeSettings())
            assert reader.encoded(sample).tobytes() == expected.data
            assert tuple(reader.sizes[sample]) == (expected.height, expected.width)
    assert list(verify(out, decode=True)) == []


@pytest.mark.parametrize("at", range(1, 36, 5))
def test_the_quarantine_is_complete_after_an_interruption(image_folder, tmp_path, monkeypatch, at):
    bad_folder(image_folder, tmp_path / "in")
    found = scan(tmp_path / "in")
    convert_folder(found, tmp_path / "whole", on_bad="skip")
    conversion = plan_conversion(found, "source", EncodeSettings())
    source = encoded_images(found, Workers(EncodeSettings(), 0))
    calls = [0]

    def images(split: str, first: int) -> Generator[Image, None, None]:
        for image in source(split, first):
            if calls[0] == at:
                raise Stop
            calls[0] += 1
            yield image

    output = {"writer": str(BetonWriter)}
    with pytest.raises(Stop):
        convert(conversion, images, BetonWriter, output, tmp_path / "out", "skip")
    convert(conversion, source, BetonWriter, output, tmp_path / "out", "skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_bad_image_stops_the_run_and_skipping_it_goes_on(image_folder, tmp_path):
    bad_folder(image_folder, tmp_path / "in")
    with pytest.raises(UserError, match=r"000\.JPEG: empty"):
        convert_folder(tmp_path / "in", tmp_path / "out")
    manifest = convert_folder(tmp_path / "in", tmp_path / "out", on_bad="skip")
    assert manifest.splits["train"].num_quarantined == 2


def test_a_split_of_bad_images_only_says_why_again_and_again(tmp_path):
    (tmp_path / "in" / "train" / "ant").mkdir(parents=True)
    (tmp_path / "in" / "train" / "ant" / "1.jpg").write_text("no image")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of its 1 images .* the last: ant/1\.jpg: not an image"):
            convert_folder(tmp_path / "in", tmp_path / "out", on_bad="skip")


def test_an_image_that_the_format_cannot_hold_is_bad(image_folder, tmp_path):
    small_pages = partial(BetonWriter, page_size=4096)
    with pytest.raises(UserError, match=r"once encoded, but a page of a \.beton file holds 4,096"):
        convert_folder(image_folder, tmp_path / "a", small_pages)
    manifest = convert_folder(image_folder, tmp_path / "b", small_pages, on_bad="skip")
    assert 0 < manifest.splits["train"].num_quarantined < 24
    assert list(verify(tmp_path / "b", decode=True)) == []


CTRL_C = """
import signal, sys
from sdpnet.preprocess import build_ffcv
from sdpnet.preprocess.conversion import convert
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
add, calls = convert.Records.append, [0]
def interrupted(self, record):
    calls[0] += 1
    if calls[0] == 20:
        signal.raise_signal(signal.SIGINT)
    add(self, record)
convert.Records.append = interrupted
sys.exit(build_ffcv.main(sys.argv[1:]))
"""


def test_ctrl_c_ends_in_a_line_and_the_same_command_goes_on(image_folder, shard_set, tmp_path):
    arguments = ["--source", str(image_folder), "--out", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "sdpnet.preprocess.build_ffcv", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "train: 19 of 24 images are done already" in done.stderr
    assert read_manifest(tmp_path / "out").splits == read_manifest(shard_set).splits
    for name in ("train.beton", "val.beton"):
        assert (tmp_path / "out" / name).read_bytes() == (shard_set / name).read_bytes()


def test_sigterm_leaves_what_a_kill_leaves(image_folder, tmp_path):
    code = CTRL_C.replace("raise_signal(signal.SIGINT)", "raise_signal(signal.SIGTERM)")
    arguments = ["--source", str(image_folder), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM
    convert_folder(image_folder, tmp_path / "whole")
    assert os.listdir(tmp_path / "out") == [".unfinished"]


@pytest.mark.parametrize("make_writer", WRITERS)
def test_an_archive_and_its_folder_give_the_same_shards(image_folder, tmp_path, make_writer):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(image_folder / split, arcname=split)
    archives = convert_folder(scan(None, tmp_path / "train.tar", tmp_path / "val.tar"), tmp_path / "tar", make_writer)
    folders = convert_folder(scan(image_folder), tmp_path / "folder", make_writer)
    assert archives.origin == Origin({"train": "train.tar", "val": "val.tar"})
    assert replace(archives, origin=folders.origin) == folders
    for name in ("tar", "folder"):
        (tmp_path / name / "manifest.json").unlink()
    assert contents(tmp_path / "tar") == contents(tmp_path / "folder")
