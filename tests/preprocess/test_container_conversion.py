"""Conversions of Parquet files and WebDataset tars: kills, parts, bad images, changed sources, and where splits lie."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from container_files import image_bytes, images_of, tar_bytes, write_parquet
from conversion import convert_folder
from faults import ROOT, Commands, Fault, contents, require_absent_or_complete, require_finished

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess import build_dali, build_ffcv, describe
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.sources.val_draw import ValDraw
from sdpnet.preprocess.verify import verify

NAMES = ("ant", "bee")
SOURCES = [pytest.param("parquet", marks=pytest.mark.skipif("not pyarrow_is_here()")), "tars"]


def pyarrow_is_here() -> bool:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def make_source(folder: Path, kind: str, num_train: int = 12, num_val: int = 5, bad: bool = True) -> Path:
    """Two files of train and one of val, with a few images; images 1 and 7 of train and 2 of val are bad."""
    for split, count, first in (("train", num_train, 0), ("val", num_val, 100)):
        images = images_of(count, first)
        if bad:
            for number in (1, 7) if split == "train" else (2,):
                images[number] = b"no image"
        labels = [(number * 7 // 3) % 2 for number in range(count)]
        num_files = 2 if split == "train" else 1
        for number in range(num_files):
            part = slice(number * count // num_files, (number + 1) * count // num_files)
            if kind == "parquet":
                path = folder / "data" / f"{split}-{number:05}-of-{num_files:05}.parquet"
                write_parquet(path, images[part], labels[part], NAMES, rows=3)
                continue
            files = []
            for index, (image, label) in enumerate(zip(images[part], labels[part], strict=True), part.start):
                fields = json.dumps({"label": label, "class_name": NAMES[label]}).encode()
                files += [(f"{index:03}.jpg", image), (f"{index:03}.json", fields)]
            folder.mkdir(exist_ok=True)
            (folder / f"{split}-{number:06}.tar").write_bytes(tar_bytes(files))
    return folder


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / request.param, request.param)


@pytest.fixture(scope="module")
def whole(commands: Commands, source: Path, tmp_path_factory) -> dict[str, Path]:
    """The source converted without a fault, by format."""
    sets = {}
    for format in ("beton", "tar"):
        sets[format] = tmp_path_factory.mktemp("whole") / format
        ended = commands.run(format, arguments_of(source, sets[format]))
        assert ended.status == 0, ended.stderr
    return sets


def arguments_of(source: Path, out: Path, *more: str) -> list[str]:
    return ["--source", str(source), "--out", str(out), "--on-bad", "skip", *more]


def test_the_set_is_that_of_the_images(whole, source):
    """The shards have the images in the order of the source, and the list of bad ones names their places."""
    for out in whole.values():
        assert list(verify(out, decode=True)) == []
        manifest, reader = open_split(out, "train")
        good = [number for number in range(12) if number not in (1, 7)]
        assert reader.labels.tolist() == [(number * 7 // 3) % 2 for number in good]
        assert manifest.classes == NAMES
        bad = [json.loads(line)["file"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
        if source.name == "parquet":
            first, second = (f"train-{number:05}-of-00002.parquet" for number in range(2))
            assert bad == [f"{first}#1", f"{second}#1", "val-00000-of-00001.parquet#2"]
        else:
            assert bad == ["train-000000.tar/001.jpg", "train-000001.tar/007.jpg", "val-000000.tar/002.jpg"]


@pytest.mark.parametrize("format", ["beton", "tar"])
@pytest.mark.parametrize("moment", range(6))
def test_killed_at_a_random_call(commands, source, whole, tmp_path, format, moment):
    rng = np.random.default_rng([moment, len(source.name)])
    fault = Fault("*", "", 1 + int(rng.integers(120)), str(rng.choice(["kill", "kill half", "kill after"])))
    ended = commands.run(format, arguments_of(source, tmp_path / "out"), fault)
    assert ended.status == -signal.SIGKILL
    require_absent_or_complete(tmp_path / "out", whole[format])
    require_finished(commands.run(format, arguments_of(source, tmp_path / "out")), tmp_path / "out", whole[format])


def test_killed_with_its_processes(commands, source, whole, tmp_path):
    """With real workers, at a point in the middle of a row group."""
    fault = Fault("add", nth=5, action="kill after")
    ended = commands.run("beton", arguments_of(source, tmp_path / "out", "--workers", "2"), fault, processes=True)
    assert ended.status == -signal.SIGKILL
    again = commands.run("beton", arguments_of(source, tmp_path / "out", "--workers", "2"), processes=True)
    require_finished(again, tmp_path / "out", whole["beton"])


@pytest.mark.parametrize("count", [2, 5])
def test_parts_merge_into_what_one_machine_makes(commands, source, whole, tmp_path, count):
    for number in range(count, 0, -1):
        ended = commands.run("tar", arguments_of(source, tmp_path / "out", "--part", f"{number}/{count}"))
        assert ended.status == 0, ended.stderr
    ended = commands.run("tar", ["--merge", "--out", str(tmp_path / "out")])
    assert ended.status == 0, ended.stderr
    assert contents(tmp_path / "out") == contents(whole["tar"])


@pytest.mark.slow
def test_parts_on_ray(source, whole, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (it is an optional executor)")
    code = "import sys; from sdpnet.preprocess.build_ffcv import main; sys.exit(main(sys.argv[1:]))"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    arguments = arguments_of(source, tmp_path / "out", "--ray", "2", "--workers", "1")
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    convert_folder(scan(source), tmp_path / "whole", on_bad="skip")
    for path in (tmp_path / "whole").iterdir():
        if path.name != "manifest.json":  # which has the name of the source
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_changed_source_is_refused(commands, source, whole, tmp_path):
    copy = shutil.copytree(source, tmp_path / source.name)
    out = tmp_path / "out"
    ended = commands.run("beton", arguments_of(copy, out), Fault("add", nth=5))
    assert ended.status == -signal.SIGKILL
    shutil.rmtree(copy)
    make_source(copy, source.name, num_train=14)
    ended = commands.run("beton", arguments_of(copy, out))
    assert ended.status == 2 and "an unfinished conversion with other images lies here" in ended.stderr
    shutil.rmtree(copy)
    make_source(copy, source.name)  # the same bytes, but other files
    require_finished(commands.run("beton", arguments_of(copy, out)), out, whole["beton"])


def test_a_bad_image_is_named(source, tmp_path, capfd):
    assert build_ffcv.main(["--source", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    last = capfd.readouterr().err.rstrip().rpartition("\n")[2]
    name = "data/train-00000-of-00002.parquet: row 1" if source.name == "parquet" else "train-000000.tar: 001.jpg"
    assert re.fullmatch(rf"error: .*{name}: .*\(pass --on-bad skip to skip such images\)", last)


def test_the_summary_accounts_for_all_files(source, tmp_path, capsys):
    assert build_dali.main(arguments_of(source, tmp_path / "out", "--workers", "1")) == 0
    out = capsys.readouterr().out
    if source.name == "parquet":
        assert "train: 12 images found, 10 converted, 2 bad" in re.sub(" +", " ", out)
        assert "from data/train-*-of-00002.parquet (image, label)" in out
        assert "17 files found = 14 converted + 3 bad + 0 left out" in out
    else:
        assert "from tars/train-*.tar" in out
        assert "files that were read for the labels: 17, such as train-000000.tar/000.json" in out
        assert "34 files found = 14 converted + 3 bad + 17 left out" in out
    assert describe.main([str(tmp_path / "out")]) == 0
    assert "train from " in capsys.readouterr().out


def test_val_is_drawn_by_class(source):
    path = source / "data/train-00001-of-00002.parquet" if source.name == "parquet" else source / "train-000001.tar"
    found = scan(path, val_draw=ValDraw(0.34))
    splits = found.splits
    assert list(splits) == ["train", "val"] and splits["train"].num_images + splits["val"].num_images == 6
    assert set(splits["train"].labels.tolist()) == {0, 1}
    every = scan(path).splits["train"]
    data = Counter(every.locate(index).read() for index in range(6))
    both = Counter(split.locate(i).read() for split in splits.values() for i in range(split.num_images))
    assert data == both


def test_a_full_disk_is_noticed_before(source, tmp_path, monkeypatch, capfd):
    from sdpnet.preprocess.conversion import command

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, 100))
    assert build_ffcv.main(arguments_of(source, tmp_path / "out", "--workers", "1")) == 2
    assert re.search(r"needs about .* \(estimated from \d+ of 17 images\)", capfd.readouterr().err)


def test_labels_of_val_in_a_file_are_refused(source, tmp_path):
    (tmp_path / "val.txt").write_text("x 1\n")
    with pytest.raises(UserError, match=r"val\.txt: .* has its labels in its files; omit --val-labels"):
        scan(source, val_labels=tmp_path / "val.txt")


def test_flags_of_the_source_with_merge(tmp_path, capsys):
    assert build_ffcv.main(["--merge", "--out", str(tmp_path), "--image-column", "x"]) == 2
    assert "--image-column with --merge: the parts already have a source; omit" in capsys.readouterr().err


class TestPlaces:
    """Which files are which split. Parquet files here have no contents: names decide."""

    pytestmark = pytest.mark.skipif("not pyarrow_is_here()")

    @staticmethod
    def write(root: Path, *names: str) -> Path:
        for number, name in enumerate(names):
            path = root / name
            if path.suffix == ".parquet":
                write_parquet(path, images_of(2, number), [0, 1], NAMES)
            elif path.suffix == ".tar":
                path.parent.mkdir(parents=True, exist_ok=True)
                files = [(f"{label}.{s}", d) for label in (0, 1) for s, d in (("jpg", b"x"), ("cls", b"%d" % label))]
                path.write_bytes(tar_bytes(files))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(image_bytes(number) if path.suffix == ".jpg" else b"text")
        return root

    @pytest.mark.parametrize(
        ("names", "train", "val", "left_out"),
        [
            (["train.parquet", "val.parquet"], "train.parquet", "val.parquet", 0),
            (["0.parquet", "1.parquet"], "*.parquet", None, 0),
            (["x.parquet"], "x.parquet", None, 0),
            (
                ["data/train-0.parquet", "data/valid-0.parquet", "data/test-0.parquet", "README.md"],
                "data/train-0.parquet",
                "data/valid-0.parquet",
                2,
            ),
            (
                ["train/0000.parquet", "validation/0000.parquet", "test/0.parquet"],
                "train/0000.parquet",
                "validation/0000.parquet",
                1,
            ),
            (["train/0.tar", "val/0.tar"], "train/0.tar", "val/0.tar", 4),
            (["train/0.tar", "val/a/1.jpg", "val/b/1.jpg"], "train/0.tar", "val/", None),
            (["train/ant/1.jpg", "train/bee/1.jpg", "val/0.parquet"], "train/", "val/0.parquet", 0),
            (
                ["in-train-0.tar", "in-train-1.tar", "in-validation-0.tar", "in-test-0.tar"],
                "in-train-*.tar",
                "in-validation-0.tar",
                7,
            ),
            (["a/1.jpg", "b/1.jpg", "metadata.parquet", "x.txt"], "", None, 2),  # class folders
        ],
    )
    def test_of_a_source(self, tmp_path, names, train, val, left_out):
        root = self.write(tmp_path / "root", *names)
        if left_out is None:
            with pytest.raises(UserError, match=r"2 class folders that train does not have, first 'a'"):
                scan(root)
            return
        found = scan(root)
        places = {split: place.partition(" (")[0].removeprefix("root/") for split, place in found.origin.places.items()}
        assert places == {"train": train} | ({} if val is None else {"val": val})
        assert found.origin.num_left_out == left_out

    def test_of_train_and_val(self, tmp_path):
        root = self.write(
            tmp_path, "data/train-0.parquet", "data/validation-0.parquet", "data/test-0.parquet", "t/test.parquet"
        )
        by_folder = scan(None, train=root / "data", val=root / "data").origin
        assert by_folder.places["val"] == "data/validation-0.parquet (image, label)"
        assert by_folder.num_left_out == 1
        assert scan(root, val=root / "data/test-0.parquet").origin.places["val"] == "data/test-0.parquet (image, label)"
        assert scan(root, val=root / "t").origin.places["val"] == "t/test.parquet (image, label)"

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ["val-0.parquet", "test-0.parquet"],
                r"has test-0\.parquet, val-0\.parquet, but no files of the train split; name",
            ),
            (
                ["validation.tar"],
                r"has validation\.tar, but no files of the train split; name their folder with --train",
            ),
            (["train-0.parquet", "train-0.tar"], r"has both Parquet files \(train-0\.parquet\) and WebDataset tars"),
            (
                ["train-0.parquet", "ant/1.jpg"],
                r"has both class folders with images \(ant/\) and train-0\.parquet; move one",
            ),
            (["0000.tar", "ant/1.jpg"], r"has both class folders with images \(ant/\) and 0000\.tar; move one"),
            (["data/train-0.parquet", "data/ant/1.jpg"], r"data: has both class folders with images \(ant/\)"),
            (
                ["data/train-00001-of-00003.parquet"],
                r"data: 2 of 3 files are missing, first train-00000-of-00003\.parquet; download",
            ),
        ],
    )
    def test_one_line_says_what_is_wrong(self, tmp_path, names, message):
        with pytest.raises(UserError, match=message):
            scan(self.write(tmp_path, *names))

    def test_the_same_files_twice(self, tmp_path):
        root = self.write(tmp_path, "x/0.parquet")
        with pytest.raises(UserError, match=r"0\.parquet: is in both the train and the val split"):
            scan(None, train=root / "x", val=root / "x" / "0.parquet")


def test_a_parquet_file_of_texts_is_refused(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train-0.parquet")
    message = (
        r"train-0\.parquet: no column with bytes of images \(binary, or a struct with bytes\), but 'text', 'label'"
    )
    with pytest.raises(UserError, match=message):
        scan(tmp_path)


def test_hostile_files_end_well():
    """A sample of the fault matrix; `./dev faults` runs all of its trials."""
    pytest.importorskip("pyarrow")
    command = [sys.executable, "tests/fault_matrix", "--kinds", "hostile Parquet,hostile Web", "--share", "0.005"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
