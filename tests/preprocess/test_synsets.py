"""The development kit is made with scipy in the official structure; torchvision's parser is the oracle."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import imagenet

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.labels import read_labels
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.sources.synsets import read_devkit, read_synsets

scipy_io = pytest.importorskip("scipy.io")

GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
WNIDS = {1: "n03", 2: "n01", 3: "n04", 4: "n02", 5: "n09"}  # 5 has children: a class of the hierarchy, not of the data
IDS = [4, 1, 1, 3, 2, 4, 2]
FIELDS = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images"]


def meta_mat(wnids: dict[int, str] = WNIDS) -> bytes:
    synsets = np.zeros((len(wnids), 1), [(name, object) for name in FIELDS])
    for row, (number, wnid) in zip(synsets[:, 0], wnids.items(), strict=True):
        children = np.array([[1, 2, 3, 4]], np.uint16) if number == 5 else np.zeros((1, 0), np.uint8)
        words = f"kit fox {number}, Vulpes macrotis"
        row["ILSVRC2012_ID"], row["WNID"], row["words"], row["gloss"] = np.uint16(number), wnid, words, "a fox"
        row["num_children"], row["children"] = np.uint8(children.size), children
        row["wordnet_height"], row["num_train_images"] = np.uint8(0), np.uint16(1300)
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"synsets": synsets}, do_compression=True)
    return buffer.getvalue()


def devkit(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    truth = "".join(f"{number}\n" for number in IDS).encode()
    files = {"ILSVRC2012_devkit_t12/readme.txt": b"x", META: meta_mat(), GROUND_TRUTH: truth}
    return devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", files)


NAMES = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, len(IDS) + 1)]
CLASSES = ("n01", "n02", "n03", "n04")


def test_the_packed_devkit_gives_torchvisions_labels(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)  # the MD5 of the official file
    imagenet.parse_devkit_archive(tmp_path)
    _, wnids = imagenet.load_meta_file(tmp_path)
    labels = read_labels(kit, Path("val"), NAMES, CLASSES)
    assert [CLASSES[label] for label in labels] == wnids


def test_every_form_of_the_synsets_says_the_same(kit, tmp_path):
    (tmp_path / "meta.mat").write_bytes(meta_mat())
    (tmp_path / "map_clsloc.txt").write_text("".join(f"{wnid} {number} kit_fox\n" for number, wnid in WNIDS.items()))
    (tmp_path / "ids.txt").write_text("".join(f"{number} {wnid} 7 words\n" for number, wnid in WNIDS.items()))
    (tmp_path / "list.txt").write_text("".join(f"{wnid} kit fox\n" for wnid in WNIDS.values()))
    for name in ("meta.mat", "map_clsloc.txt", "ids.txt", "list.txt", kit.name):
        assert read_synsets(tmp_path / name) == WNIDS, name
    assert read_devkit(kit)[1] == WNIDS
    (tmp_path / "truth.txt").write_text(read_devkit(kit)[0])
    expected = read_labels(kit, Path("val"), NAMES, CLASSES)
    for name in ("meta.mat", "map_clsloc.txt"):
        labels = read_labels(tmp_path / "truth.txt", Path("val"), NAMES, CLASSES, tmp_path / name)
        assert np.array_equal(labels, expected)


def test_a_scan_takes_the_devkit_beside_the_images(kit, tmp_path):
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.JPEG").touch()
    (tmp_path / "val").mkdir()
    for name in NAMES:
        (tmp_path / "val" / name).touch()
    by_class = sorted((WNIDS[number], name) for number, name in zip(IDS, NAMES, strict=True))

    def check() -> None:
        val = scan(tmp_path).splits["val"]
        listed = [(CLASSES[val.labels[index]], val.relative_path(index)) for index in range(val.num_images)]
        assert listed == by_class

    check()
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in IDS))
    check()
    kit.unlink()
    with pytest.raises(UserError, match="labels up to 4 and no 0: ILSVRC2012's IDs"):
        scan(tmp_path)
    (tmp_path / "meta.mat").write_bytes(meta_mat())
    assert scan(tmp_path, synsets=tmp_path / "meta.mat").splits["val"].num_images == len(IDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; give the devkit's meta.mat"),
        ("n01 tench\nn02 goldfish\nn03 shark\n", "class names in alphabetical order, which is not the order"),
        ("1 n03\n1 n01\n", "an ID or a class name is in it twice"),
        ("1 n03\n2 n03\n", "an ID or a class name is in it twice"),
        ("n03\nn01\nn03\n", "an ID or a class name is in it twice"),
    ],
)
def test_lists_that_cannot_be_right(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_synsets(tmp_path / "list.txt")
    assert "\n" not in str(caught.value)


def test_damaged_devkits(kit, tmp_path):
    content = kit.read_bytes()
    for length in (0, 1, 20, len(content) // 2):
        kit.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"t12\.tar\.gz: (cannot be read|has no)") as caught:
            read_devkit(kit)
        assert "\n" not in str(caught.value)
    devkit(kit, {GROUND_TRUTH: b"1\n"})
    with pytest.raises(UserError, match=r"has no meta\.mat in it; download"):
        read_devkit(kit)
    with pytest.raises(UserError, match="none: cannot be read"):
        read_synsets(tmp_path / "none")
    with pytest.raises(UserError, match=r"none\.tgz: no such file"):
        read_synsets(tmp_path / "none.tgz")


# The names, because the bytes hold the time: pytest-xdist's workers would collect different tests.
@pytest.mark.parametrize(
    "content", [b"", b"x" * 1000, meta_mat()[:-100], meta_mat()[:300]], ids=["empty", "text", "cut", "head"]
)
def test_damaged_meta_mat(tmp_path, content):
    (tmp_path / "meta.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.mat: no meta\.mat of ILSVRC2012 \(.*\); download") as caught:
        read_synsets(tmp_path / "meta.mat")
    assert "\n" not in str(caught.value)


def test_without_scipy(tmp_path, monkeypatch):
    (tmp_path / "meta.mat").write_bytes(meta_mat())
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"needs scipy .*; .*pip install scipy"):
        read_synsets(tmp_path / "meta.mat")
