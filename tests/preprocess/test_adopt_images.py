"""Shard sets of images where they lie: made by adopt, read by every pipeline, checked by verify."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion import convert_folder
from in_place_sets import CLASSES, adopt_images, as_ilsvrc_tars, as_webdataset, write_images, write_odd_images
from jpeg_files import make_image, pillow_jpeg
from PIL import Image
from pipeline_batches import collect, load, pipeline
from special_files import SPECIAL_FILES

from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.shards import manifest as manifests
from sdpnet.pipelines.shards.in_place import InPlaceReader
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import read_manifest
from sdpnet.preprocess import describe
from sdpnet.preprocess.adopt import main
from sdpnet.preprocess.adoption import command, index
from sdpnet.preprocess.adoption.look import Look
from sdpnet.preprocess.encoding.encode import EncodeSettings
from sdpnet.preprocess.verify import verify

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "sdpnet adopt --replace"
READERS = [pipeline("native"), pipeline("torchvision"), pipeline("dali")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def tars(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_ilsvrc_tars(images, tmp_path_factory.mktemp("tars") / "ilsvrc")


@pytest.fixture(scope="module")
def in_place(images: Path, tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images in place: in a folder, in ILSVRC2012's tars, and in WebDataset tars."""
    folder = tmp_path_factory.mktemp("shards")
    sources = {"folder": images, "tars": tars, "webdataset": as_webdataset(images, folder / "tars of samples")}
    for name, source in sources.items():
        adopt_images(source, folder / name)
    return {name: folder / name for name in sources}


@pytest.fixture(scope="module")
def kept(images: Path, native: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, converted with --reencode never."""
    out = tmp_path_factory.mktemp("kept")
    convert_folder(images, out, settings=EncodeSettings(reencode="never", max_side=0))
    return out


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of images that a test may change, and the set of it in place."""
    images = write_images(tmp_path / "images")
    adopt_images(images, tmp_path / "shards")
    return images, tmp_path / "shards"


def same_batches(one: Path, other: Path, name: str, split: str, size: int) -> None:
    first, second = (collect(load(data, name, split, image_size=size)) for data in (one, other))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels) and torch.equal(a.sample_ids, b.sample_ids)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["folder", "tars", "webdataset"])
def test_pixels_are_those_of_kept_jpegs(in_place: dict[str, Path], kept: Path, name: str, kind: str, size: int) -> None:
    """To the bit, also those of progressive JPEGs, and where an image is much larger than its crop."""
    for split in ("train", "val"):
        same_batches(in_place[kind], kept, name, split, size)


@pytest.mark.parametrize("kind", ["folder", "tars", "webdataset"])
def test_tables_are_those_of_a_conversion(in_place: dict[str, Path], kept: Path, kind: str) -> None:
    for split in ("train", "val"):
        manifest, reader = open_split(in_place[kind], split)
        other, converted = open_split(kept, split)
        assert manifest.classes == other.classes == CLASSES
        assert np.array_equal(reader.labels, converted.labels)
        assert np.array_equal(reader.sizes, converted.sizes)
        assert manifest.splits[split].num_kept == reader.num_samples


def test_bytes_are_those_of_the_files(images: Path, in_place: dict[str, Path]) -> None:
    paths = sorted((images / "train").glob("*/*"))
    for kind, data in in_place.items():
        _, reader = open_split(data, "train")
        assert [reader.encoded(i).tobytes() for i in range(reader.num_samples)] == [p.read_bytes() for p in paths]
        assert not reader.encoded(0).flags.writeable
        if kind == "folder":
            assert [Path(reader.file_of(i)).resolve() for i in range(reader.num_samples)] == paths
        with pytest.raises(IndexError):
            reader.encoded(reader.num_samples)


def test_a_reader_can_be_sent_to_another_process(in_place: dict[str, Path]) -> None:
    import pickle

    for data in in_place.values():
        _, reader = open_split(data, "train")
        again = pickle.loads(pickle.dumps(reader))
        assert isinstance(again, InPlaceReader)
        assert np.array_equal(again.encoded(5), reader.encoded(5))


def test_the_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--source", str(images), "--out", str(out), "--workers", "2"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "3 classes; the images stay where they are" in said.out and "train: 24 images, from train/" in said.out
    assert sorted(os.listdir(out)) == ["manifest.json", "train.index", "val.index"]
    assert list(verify(out)) == []
    content = (out / "train.index").read_bytes()
    assert main(arguments) == 2
    assert "already holds a shard set of images in place; if they have changed" in capsys.readouterr().err
    assert main([*arguments, "--replace"]) == 0
    assert (out / "train.index").read_bytes() == content
    assert describe.main([str(out), "--images", "2"]) == 0
    assert "where they lie, as they are" in capsys.readouterr().out


def test_flags_that_do_not_fit(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for arguments, message in (
        (["--source", str(images)], "--out is missing"),
        (["--train", str(images / "train")], "--out is missing"),
        ([*out, "--train", "a.beton"], "omit --out"),
        ([*out, "--source", str(images), "--classes", "x"], "--classes"),
        ([*out, "--source", str(images), "--workers", "0"], "--workers 0: must be 1 to 512"),
        ([*out, "--source", str(images), "--workers", "100000"], "--workers 100000: must be 1 to 512"),
        ([*out, "--source", str(tmp_path / "none")], "no such folder"),
        ([*out, "--source", str(images), "--val-share", "0.1"], "already the val split"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_share_of_train_becomes_val(images: Path, tmp_path: Path) -> None:
    arguments = ["--source", str(images / "train"), "--out", str(tmp_path / "out"), "--val-share", "0.25"]
    assert main(arguments) == 0
    counts = {name: split.num_samples for name, split in read_manifest(tmp_path / "out").splits.items()}
    assert counts == {"train": 18, "val": 6}


def test_the_folder_of_another_set_is_refused(
    shard_set: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--replace"]):
        assert main(["--source", str(images), "--out", str(shard_set), *more]) == 2
        assert "already holds a shard set; remove it" in capsys.readouterr().err


# ---- images that cannot be taken as they are


@pytest.mark.usefixtures("native")
def test_odd_images_are_converted(tmp_path: Path) -> None:
    images = write_odd_images(tmp_path / "images")
    manifest = adopt_images(images, tmp_path / "shards")
    split = manifest.splits["train"]
    assert (split.num_samples, split.num_kept) == (26, 24)
    assert sorted(split.files[0].sidecars) == ["train.converted"]
    assert not (tmp_path / "shards" / "val.converted").exists()
    assert list(verify(tmp_path / "shards", decode=True)) == []
    settings = EncodeSettings(reencode="auto", max_side=0)
    convert_folder(images, tmp_path / "auto", settings=settings)
    same_batches(tmp_path / "shards", tmp_path / "auto", "native", "train", 48)
    # The file of converted images belongs to the set: a copy of the set has another time, which does not matter.
    os.utime(tmp_path / "shards" / "train.converted", (1, 1))
    assert list(verify(tmp_path / "shards")) == []
    with (tmp_path / "shards" / "train.converted").open("r+b") as file:
        file.seek(100)
        file.write(b"xyz")
    assert next(problem.file for problem in verify(tmp_path / "shards")) == "train.converted"


def test_bad_images_end_the_command_or_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images")
    bad = images / "train" / "bee" / "page.jpg"
    bad.write_text("<html>not found</html>")
    (images / "train" / "bee" / "empty.jpg").touch()
    arguments = ["--source", str(images), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(images / "train" / "bee") in error and "--on-bad skip" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--on-bad", "skip"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["bee/empty.jpg", "bee/page.jpg"]
    assert "an HTML page" in lines[1]["reason"]
    assert list(verify(tmp_path / "out")) == []
    assert open_split(tmp_path / "out", "train")[1].num_samples == 24
    bad.unlink()
    (images / "train" / "bee" / "empty.jpg").unlink()
    assert main([*arguments, "--replace"]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "train.index", "val.index"]


def test_a_set_of_other_formats_is_to_be_converted(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    for path in list((images / "train").glob("*/*"))[:13]:
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"13 of its 24 train images .*sdpnet convert"):
        adopt_images(images, tmp_path / "out")


@pytest.mark.usefixtures("native")
def test_decode_finds_images_that_are_cut(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    path = images / "train" / "cow" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    adopt_images(images, tmp_path / "headers")
    assert "cannot be decoded" in str(next(iter(verify(tmp_path / "headers"))))
    with pytest.raises(UserError, match=r"2\.jpg: .*--on-bad skip"):
        adopt_images(images, tmp_path / "all", Look(decode=True))
    assert adopt_images(images, tmp_path / "some", Look(decode=True), "skip").splits["train"].num_quarantined == 1


@pytest.mark.usefixtures("native")
def test_images_that_exif_turns(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    turned = Image.fromarray(make_image(5, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(images / "train" / "ant" / "turned.jpg", exif=exif)
    exif[0x0112] = 1
    turned.save(images / "train" / "ant" / "upright.jpg", exif=exif)
    ignored = adopt_images(images, tmp_path / "ignored")
    assert ignored.splits["train"].num_kept == 26
    applied = adopt_images(images, tmp_path / "applied", Look(exif="apply"))
    assert applied.splits["train"].num_kept == 25
    _, reader = open_split(tmp_path / "applied", "train")
    assert reader.sizes[8:10].tolist() == [[60, 40], [40, 60]]


# ---- runs that end early


def test_a_run_that_fails_leaves_nothing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "write_index", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adopt_images(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_the_command_with_one_line(images: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from sdpnet.preprocess import adopt\n"
        "from sdpnet.preprocess.adoption import index\n"
        "index.write_index = lambda *_: (print('now', flush=True), time.sleep(60))\n"
        f"sys.exit(adopt.main(['--source', {str(images)!r}, '--out', {str(tmp_path / 'out')!r}, '--workers', '1']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "now\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error.splitlines()[-1] == "interrupted" and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", range(1, 4))
def test_a_run_that_is_killed_while_it_publishes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The folder is no shard set then, and the same command makes it one."""
    out = tmp_path / "out"
    adopt_images(images, out)
    count = 0

    def killed(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        os.replace(arguments[1] if len(arguments) > 1 else "", str(arguments[0])) if len(arguments) > 1 else None

    monkeypatch.setattr(command, "publish", killed)
    monkeypatch.setattr(command, "publish_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        adopt_images(images, out)
    assert not (out / "manifest.json").exists()
    monkeypatch.undo()
    assert main(["--source", str(images), "--out", str(out), "--workers", "1"]) == 0
    assert list(verify(out)) == []


def test_a_worker_that_is_killed(images: Path, tmp_path: Path) -> None:
    from sdpnet.preprocess.adoption.lookers import Lookers

    with Lookers(Look(), 2) as lookers:
        for process in lookers._processes:
            process.kill()
        with pytest.raises(UserError, match=r"was ended \(SIGKILL\)"):
            list(lookers.map([[(str(images), 0, None)]]))


def test_workers_end_with_their_parent(images: Path, tmp_path: Path) -> None:
    """A killed command leaves no process and no file with a final name."""
    code = (
        "import os, signal, sys\n"
        "from sdpnet.preprocess.adoption.look import Look\n"
        "from sdpnet.preprocess.adoption.lookers import Lookers\n"
        "lookers = Lookers(Look(), 2)\n"
        "print(*[process.pid for process in lookers._processes], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    import time

    for pid in map(int, ended.stdout.split()):
        for _ in range(1000):
            try:
                os.kill(pid, 0)
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except (ProcessLookupError, FileNotFoundError):
                break
            if state == "Z":
                break
            time.sleep(0.01)
        else:
            pytest.fail(f"process {pid} goes on")


# ---- files that change


def epoch(data: Path, name: str, **options: object) -> list:
    return collect(load(data, name, image_size=32, **options))


CHANGES = {
    "removed": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "cut": lambda path: os.truncate(path, 100),
    "written again": lambda path: path.write_bytes(path.read_bytes()),
    **{name: lambda path, make=make: (path.unlink(), make(path)) for name, make in SPECIAL_FILES.items()},
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_named(own: tuple[Path, Path], name: str, change: str) -> None:
    images, data = own
    path = images / "train" / "bee" / "3.jpg"
    before = path.stat()
    CHANGES[change](path)
    if change == "written again":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ShardError) as caught:
        epoch(data, name)
    assert str(caught.value).startswith(f"{path}: ") and AGAIN in str(caught.value)
    for quick in (True, False):
        (problem,) = verify(data, quick=quick)
        assert problem.file == str(path) and AGAIN in str(problem)


@pytest.mark.parametrize("name", READERS)
def test_a_changed_tar_is_named(tars: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(tars, tmp_path / "tars"))
    adopt_images(copy, tmp_path / "shards")
    path = copy / "ILSVRC2012_img_train.tar"
    loader = load(tmp_path / "shards", name, image_size=32)
    batches = loader.batches(0)
    next(batches)
    os.utime(path, (1, 1))
    with pytest.raises(ShardError, match=r"ILSVRC2012_img_train\.tar: was changed while it was in use"):
        list(batches)
    for _ in range(2):
        with pytest.raises(ShardError, match=f"ILSVRC2012_img_train.tar: .*{AGAIN}"):
            open_split(tmp_path / "shards", "train")
        (problem,) = verify(tmp_path / "shards")
        assert problem.file == str(path) and AGAIN in str(problem)
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", READERS)
def test_a_changed_index_is_noticed(own: tuple[Path, Path], name: str) -> None:
    _, data = own
    loader = load(data, name, image_size=32, num_workers=1)
    batches = loader.batches(0)
    next(batches)
    os.truncate(data / "train.index", 60)
    with pytest.raises(ShardError, match=r"train\.index: "):
        list(batches)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_may_not_be_read(own: tuple[Path, Path], name: str) -> None:
    images, data = own
    path = images / "train" / "bee" / "3.jpg"
    path.chmod(0)
    with pytest.raises(ShardError, match=r"3\.jpg: cannot be read \(Permission denied\)"):
        epoch(data, name)


def test_only_damaged_images_are_masked(own: tuple[Path, Path], native: None) -> None:
    """A file that was changed is an error with every `on_error`."""
    images, data = own
    path = images / "train" / "bee" / "3.jpg"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(ShardError, match="has changed"):
        epoch(data, "native", on_error="mask")
    shutil.rmtree(data)
    adopt_images(images, data)  # headers are all that is read
    loader = load(data, "native", image_size=32, on_error="mask")
    valid = sum(int(batch.valid.sum()) for batch in collect(loader))
    assert loader.masked == [11] and valid == 23
    for name in ("native", "torchvision"):
        with pytest.raises(ShardError, match=r"train.index: sample 11, .*train/bee/3.jpg: damaged JPEG"):
            epoch(data, name)


def test_the_folder_of_the_images_is_no_place_for_the_set(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source", str(images), "--out", str(images), "--workers", "1"]) == 2
    assert "is the folder of the images; choose another one" in capsys.readouterr().err


def test_verify_compares_contents(tmp_path: Path, native: None) -> None:
    """Contents that change although size and time stay are found by checksums, or where they cannot be decoded."""
    images = write_images(tmp_path / "images")
    adopt_images(images, tmp_path / "plain")
    adopt_images(images, tmp_path / "checked", Look(checksums=True))
    assert list(verify(tmp_path / "checked")) == list(verify(tmp_path / "plain")) == []
    path = images / "val" / "ant" / "1.jpg"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 0x10
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (problem,) = verify(tmp_path / "checked")
    assert (problem.file, problem.sample) == ("val.index", 1) and f"{path} has changed (CRC-32)" in problem.what
    assert list(verify(tmp_path / "checked", quick=True)) == []


def test_a_million_changed_files_are_counted(own: tuple[Path, Path]) -> None:
    images, data = own
    for path in (images / "train").glob("*/*"):
        path.unlink()
    problems = [str(problem) for problem in verify(data)]
    assert len(problems) == 21 and "and 4 more files are missing or have changed" in problems[-1]


# ---- places


@pytest.mark.parametrize("name", READERS)
def test_images_and_set_can_be_moved_together(tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    images = write_images(tmp_path / "here" / "images")
    adopt_images(images, tmp_path / "here" / "sets" / "shards")
    before = epoch(tmp_path / "here" / "sets" / "shards", name)
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "link").symlink_to("there")
    after = epoch(tmp_path / "link" / "sets" / "shards", name)
    assert all(torch.equal(a.images, b.images) for a, b in zip(before, after, strict=True))


def test_a_relative_path_and_another_working_directory(own: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = own
    monkeypatch.chdir(data.parent)
    _, reader = open_split("shards", "train")
    monkeypatch.chdir("/")
    assert reader.encoded(0)[:2].tolist() == [0xFF, 0xD8]


@pytest.mark.parametrize("name", READERS)
def test_odd_names(tmp_path: Path, name: str) -> None:
    images = tmp_path / "im\nages"
    names = [b"new\nline.jpg", b"\xff\xfe.jpg", b"-rf.jpg", "\u202etxt.jpg".encode(), b"x" * 251 + b".jpg", b"%s.jpg"]
    for folder in (b"a b", b"\xe9t\xe9"):
        path = os.path.join(os.fsencode(images), folder)
        os.makedirs(path)
        for number, file in enumerate(names):
            with open(os.path.join(path, file), "wb") as writing:
                writing.write(pillow_jpeg(make_image(number, 30, 40)))
    adopt_images(images, tmp_path / "shards")
    assert list(verify(tmp_path / "shards")) == []
    assert len(epoch(tmp_path / "shards", name)) == 3
    os.unlink(os.path.join(os.fsencode(images), b"a b", names[0]))
    with pytest.raises(ShardError, match=r"new\\nline\.jpg: is not there any more"):
        epoch(tmp_path / "shards", name)


@pytest.mark.parametrize("name", READERS)
def test_more_containers_than_are_mapped(
    tmp_path: Path, images: Path, kept: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of the others are read like files."""
    tars = as_ilsvrc_tars(images, tmp_path / "tars")
    adopt_images(tars, tmp_path / "shards")
    monkeypatch.setattr("sdpnet.pipelines.shards.in_place._MAX_MAPPED", 0)
    same_batches(tmp_path / "shards", kept, name, "train", 32)


# ---- who does not read them


def test_ffcv_says_what_to_do(in_place: dict[str, Path]) -> None:
    pytest.importorskip("ffcv")
    with pytest.raises(UserError, match=r"to convert the images: sdpnet convert"):
        load(in_place["folder"], "ffcv")


def test_an_older_sdpnet_refuses_the_format(in_place: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "FORMATS", ("beton", "tar"))
    with pytest.raises(ShardError, match="format 'index' is not one of beton, tar"):
        read_manifest(in_place["folder"])


def test_a_tar_that_changes_while_it_is_indexed(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(tars, tmp_path / "tars"))
    real = index.Meter.advance

    def touched(meter: index.Meter, *arguments: int) -> None:
        os.utime(copy / "ILSVRC2012_img_train.tar", (1, 1))
        real(meter, *arguments)

    monkeypatch.setattr(index.Meter, "advance", touched)
    with pytest.raises(UserError, match="while it was read; repeat the command"):
        adopt_images(copy, tmp_path / "out")


def test_headers_far_behind_the_start(tmp_path: Path, native: None) -> None:
    """A large profile, a comment of exactly a piece, padding between segments, and a file of one class."""
    plain = pillow_jpeg(make_image(3, 50, 70))
    variants = {
        "profile": plain[:2] + b"\xff\xe2\xff\xff" + bytes(65_533) + plain[2:],
        "two": plain[:2] + 2 * (b"\xff\xe1\xff\xff" + bytes(65_533)) + plain[2:],
        "padding": plain[:2] + b"\xff\xff\xff" + plain[2:],
        "stray": plain[:2] + b"\xff\xe0\0\x04ab" + b"\0\0" + plain[2:],
        **{
            f"comment{n}": plain[:2] + b"\xff\xfe" + (n).to_bytes(2, "big") + bytes(n - 2) + plain[2:]
            for n in range(4070, 4100)
        },
    }
    folder = tmp_path / "images" / "train" / "a"
    folder.mkdir(parents=True)
    (folder.parent / "b").mkdir()
    for name, content in variants.items():
        (folder / f"{name}.jpg").write_bytes(content)
    (folder.parent / "b" / "plain.jpg").write_bytes(plain)
    manifest = adopt_images(tmp_path / "images", tmp_path / "out")
    assert manifest.splits["train"].num_kept == len(variants) + 1
    assert set(map(tuple, open_split(tmp_path / "out", "train")[1].sizes.tolist())) == {(50, 70)}
    assert list(verify(tmp_path / "out")) == []


def test_a_flat_tar_with_one_image_per_class_is_mapped(tmp_path: Path) -> None:
    """A container that holds one image and more is no file of an image."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in CLASSES:
            data = pillow_jpeg(make_image(1, 20, 30))
            entry = tarfile.TarInfo(f"{name}/one.jpg")
            entry.size = len(data)
            outer.addfile(entry, io.BytesIO(data))
    adopt_images(tmp_path / "tars", tmp_path / "out")
    _, reader = open_split(tmp_path / "out", "train")
    assert reader.places(np.arange(3)).files is None


def test_parquet_is_to_be_converted(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from container_files import parquet_bytes  # imports pyarrow

    images = [pillow_jpeg(make_image(number, 20, 30)) for number in range(6)]
    (tmp_path / "parquet").mkdir()
    content = parquet_bytes(images, [0, 1] * 3, ["ant", "bee"])
    (tmp_path / "parquet" / "train-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(
        UserError, match=r"Parquet files, which cannot be read where they lie; convert them: .*sdpnet convert"
    ):
        adopt_images(tmp_path / "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_loader_for_any_loop(in_place: dict[str, Path], kept: Path) -> None:
    from sdpnet import ImageLoader  # imports torchvision's transforms

    options = {"image_size": 32, "batch_size": 8, "augment": "none", "device": "cpu", "targets": "index", "seed": 3}
    with ImageLoader(str(in_place["folder"]), "train", **options) as loader:
        found = [(images.clone(), targets.clone()) for images, targets in loader]
    with ImageLoader(str(kept), "train", **options) as loader:
        for (images, targets), (others, their) in zip(found, loader, strict=True):
            assert torch.equal(images, others) and torch.equal(targets, their)
