"""WebDataset tars as a source, compared with the webdataset library."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from container_files import images_of, tar_bytes

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.files.file_kinds import LABEL_BESIDE, READ_FOR_LABELS
from sdpnet.preprocess.sources.listing import SplitImages
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.sources.webdataset import LABELS_ALONE, Sample, is_webdataset, list_tars, samples

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def write(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, format))
    return path


def pairs(count: int, first: int = 0, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    """Images and labels (`number % 3`), one pair after the other."""
    images = images_of(count, first)
    return [
        file
        for number, image in enumerate(images, first)
        for file in ((f"{number:06}.{suffix}", image), (f"{number:06}.cls", str(number % 3).encode()))
    ]


def read_all(split: SplitImages) -> list[tuple[str, int, bytes]]:
    return [
        (split.relative_path(index), int(split.labels[index]), split.locate(index).read())
        for index in range(split.num_images)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("writer", ["webdataset", *FORMATS])
@pytest.mark.parametrize("with_json", [True, False])
def test_it_finds_what_the_library_reads(tmp_path, writer, with_json):
    wds = pytest.importorskip("webdataset")
    images = images_of(60)
    suffixes = ("jpg", "png", "JPEG", "webp")
    for shard in range(3):
        records = []
        for number in range(shard * 20, shard * 20 + 20):
            record = {"__key__": f"a/b{number:05}", suffixes[number % 4]: images[number]}
            record |= {"json": json.dumps({"label": number % 7}).encode()} if with_json else {}
            record |= {"txt": b"a caption"} if number % 2 else {}
            record |= {} if with_json and number % 3 else {"cls": str(number % 7).encode()}
            records.append(record)
        path = tmp_path / f"train-{shard:04}.tar"
        if writer == "webdataset":
            with wds.TarWriter(str(path), encoder=False) as tar:
                for record in records:
                    tar.write(record)
        else:
            files = [(f"{r['__key__']}.{s}", data) for r in records for s, data in r.items() if s != "__key__"]
            write(path, files, writer)
    paths = sorted(str(path) for path in tmp_path.glob("*.tar"))
    expected = []
    for record in wds.WebDataset(paths, shardshuffle=False):
        (image,) = (data for suffix, data in record.items() if suffix in ("jpg", "png", "jpeg", "webp"))
        label = int(record["cls"]) if "cls" in record else json.loads(record["json"])["label"]
        expected.append((record["__key__"], label, image))
    train = scan(tmp_path).splits["train"]
    found = read_all(train)
    assert [(label, data) for _, label, data in found] == [(label, data) for _, label, data in expected]
    assert [name.partition("/")[2].partition(".")[0] for name, _, _ in found] == [key for key, _, _ in expected]
    assert train.classes == tuple("0123456") and len(found) == 60


def test_a_sample_says_where_it_lies(tmp_path):
    path = write(tmp_path / "t.tar", pairs(3))
    content = path.read_bytes()
    found = list(samples(path))
    images = [entry for entry in found if isinstance(entry, Sample)]
    assert [(image.key, image.file, image.label) for image in images] == [
        ("000000", "000000.jpg", 0),
        ("000001", "000001.jpg", 1),
        ("000002", "000002.jpg", 2),
    ]
    assert [content[image.offset :][: image.size] for image in images] == images_of(3)
    assert {(entry.kind, entry.file) for entry in found if not isinstance(entry, Sample)} == {
        (READ_FOR_LABELS, f"00000{number}.cls") for number in range(3)
    }


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"a.cls": b"5"}, 5),
        ({"a.cls": b" 5\n"}, 5),
        ({"a.json": b'{"label": 5}'}, 5),
        ({"a.json": b'{"label": "5"}'}, 5),
        ({"a.json": b'{"cls": 5, "x": 1}'}, 5),
        ({"a.json": b'{"label": "tench"}'}, "tench"),
        ({"a.json": b'{"class_name": "tench"}'}, "tench"),
        ({"a.json": b'{"label": true, "class_id": 5}'}, 5),
        ({"a.txt": b"5"}, 5),
        ({"a.cls": b"5", "a.json": b"{", "a.txt": b"a fish"}, 5),
        ({"a.cls": b"5", "a.json": b'{"label": 7}'}, 5),
    ],
)
def test_labels(tmp_path, label, expected):
    path = write(tmp_path / "t.tar", [("a.png", b"x"), *label.items()])
    assert [entry.label for entry in samples(path) if isinstance(entry, Sample)] == [expected]
    path = write(tmp_path / "t.tar", [*label.items(), ("a.png", b"x")])
    assert [entry.label for entry in samples(path) if isinstance(entry, Sample)] == [expected]


def test_files_of_a_key_need_not_be_neighbours(tmp_path):
    images, labels = pairs(6)[::2], pairs(6)[1::2]
    path = write(tmp_path / "t.tar", [*images, *reversed(labels)])
    found = read_all(scan(path).splits["train"])
    assert sorted(found) == [(f"t.tar/{name}", number % 3, data) for number, (name, data) in enumerate(images)]


X = ("x.jpg", b"x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([X], r"no label for 1 of its 7 images, first 'x'; each KEY\.jpg needs a KEY\.cls or KEY\.json"),
        ([X, ("y.jpg", b"y")], "no label for 2 of its 8 images, first 'x'"),
        ([X, ("x.cls", b"a")], r"x\.cls: 'a' is not an integer; write integers into the \.cls files, or the names"),
        ([X, ("x.cls", b"")], r"x\.cls: '' is not an integer"),
        ([X, ("x.cls", b"1.0")], r"x\.cls: '1\.0' is not an integer"),
        ([X, ("x.cls", b"-1")], r"x\.cls: label -1, must be 0 to 999,999; images without a label, as in a test split"),
        ([X, ("x.cls", b"1000000")], r"x\.cls: label 1000000, must be 0 to 999,999; number the classes from 0"),
        ([X, ("x.cls", b"9" * 400)], r"x\.cls: '9+ is not an integer"),
        ([X, ("x.json", b"[1]")], r'x\.json: must be a JSON object with the field "label"'),
        ([X, ("x.json", b"{")], r"x\.json: no JSON \("),
        ([X, ("x.json", b"[" * 100_000)], r"x\.json: no JSON \("),
        ([X, ("x.json", b" " * (1 << 21))], r"x\.json: 2,097,152 bytes of JSON"),
        ([X, ("x.json", b'{"caption": "y"}')], r"x\.json: none of the fields 'caption' is a usual name of labels"),
        ([X, ("x.txt", b"a fish")], "no label for 1 of its 7 images, first 'x'"),
        ([X, ("x.png", b"x"), ("x.cls", b"1")], r"'x' has two images, 'x\.jpg' and 'x\.png'"),
        ([X, ("x.cls", b"1"), ("x.cls", b"1")], r"'x' has two labels, 'x\.cls' and 'x\.cls'"),
        ([("000001.png", b"x")], r"'000001' has two images, '000001\.jpg' and '000001\.png'"),
        ([("000001.png", b"x"), ("000001.txt", b"1")], r"'000001' has two images"),
        ([("000001.cls", b"1")], r"'000001' has two labels, '000001\.cls' and '000001\.cls'"),
        ([X, ("x.json", b'{"label": "a"}')], r"the label of 'x' is 'a', but that of '000000' in t\.tar is 0; make"),
    ],
)
def test_one_line_names_the_tar_and_the_key(tmp_path, files, message):
    path = write(tmp_path / "t.tar", [*pairs(6), *files])
    with pytest.raises(UserError, match=rf"t\.tar: {message}"):
        scan(path)


def test_empty_tars_and_labels_alone(tmp_path):
    write(tmp_path / "a-0.tar", pairs(3))
    write(tmp_path / "a-1.tar", [])
    with pytest.raises(UserError, match=r"a-1\.tar: no images with labels in it; copy or download it again, or remove"):
        scan(tmp_path)
    write(tmp_path / "a-1.tar", [("9.cls", b"1"), *pairs(3, 3), ("8.json", b"{}"), ("7.npy", b"x")])
    found = scan(tmp_path)
    assert [(entry.kind, entry.count, entry.example) for entry in found.origin.left_out] == [
        (READ_FOR_LABELS, 6, "a-0.tar/000000.cls"),
        (LABELS_ALONE, 2, "a-1.tar/8.json"),
        (".npy files", 1, "a-1.tar/7.npy"),
    ]
    # A key whose files lie in two tars is one without a label.
    write(tmp_path / "a-1.tar", [("9.jpg", b"x"), *pairs(3, 3)])
    write(tmp_path / "a-2.tar", [("9.cls", b"1"), *pairs(3, 6)])
    with pytest.raises(UserError, match=r"a-1\.tar: no label for 1 of its 4 images, first '9'; .* in the same tar"):
        scan(tmp_path)


def test_other_files_of_a_key_are_counted(tmp_path):
    files = [("a.jpg", b"x"), ("a.cls", b"1"), ("a.json", b"{}"), ("a.npy", b"n"), ("._a.jpg", b"x"), (".b/c.jpg", b"")]
    _, _, left_out = list_tars(tmp_path, [write(tmp_path / "t.tar", files)])
    assert {entry.kind: entry.count for entry in left_out} == {
        READ_FOR_LABELS: 1,
        LABEL_BESIDE: 2,
        "files of macOS metadata": 1,
        "files in hidden folders": 1,
    }


def named(names: dict[int, str], count: int = 6, first: int = 0) -> list[tuple[str, bytes]]:
    """Images whose JSON files have the name of each label."""
    files = []
    for number, image in enumerate(images_of(count, first), first):
        fields = {"label": number % 3, "class_name": names.get(number % 3)}
        files += [(f"{number}.jpg", image), (f"{number}.json", json.dumps(fields).encode())]
    return files


def test_class_names(tmp_path):
    train = write(tmp_path / "train-0.tar", named({0: "cow", 1: "ant", 2: "bee"}))
    val = write(tmp_path / "val-0.tar", named({0: "ant", 1: "bee", 2: "cow"}, first=6))
    found = scan(tmp_path)
    assert found.classes == ("cow", "ant", "bee")  # the order of the labels
    assert found.splits["train"].labels.tolist() == [0, 1, 2] * 2
    assert found.splits["val"].labels.tolist() == [1, 2, 0] * 2  # renumbered by their names
    write(val, named({0: "ant", 1: "bee", 2: "dog"}, first=6))
    with pytest.raises(UserError, match=r"val-0\.tar: train has no class 'dog'; there are cow, ant, bee"):
        scan(tmp_path)
    write(train, named({0: "cow", 1: "cow", 2: "bee"}))  # no names for the labels, so the integers are the names
    assert scan(train).classes == ("0", "1", "2")
    write(train, named({0: "cow", 2: "bee"}))
    assert scan(train).classes == ("0", "1", "2")
    write(train, [("a.jpg", b"x"), ("a.json", b'{"label": "z"}'), ("b.jpg", b"x"), ("b.json", b'{"label": "y"}')])
    assert scan(train).classes == ("y", "z")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "tench\nshark\nray\n"),
        ("_info.json", '{"class_names": ["tench", "shark", "ray"], "splits": {}}'),
    ],
)
def test_class_names_beside_the_tars(tmp_path, name, text):
    write(tmp_path / "train" / "0.tar", pairs(6))
    write(tmp_path / "test" / "0.tar", pairs(6))
    (tmp_path / name).write_text(text)
    found = scan(tmp_path)
    assert found.classes == ("tench", "shark", "ray")
    assert [(entry.kind, entry.count) for entry in found.origin.left_out] == [
        (READ_FOR_LABELS, 6 + 1),
        ("files of test/, which is no split", 1),
    ]
    (tmp_path / name).write_text(text.replace("shark", "tench"))
    with pytest.raises(UserError, match=rf"{name}: 'tench' is the name of two classes \(0 and 1\)"):
        scan(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"0\.tar: label 2, but the classes have 2 names"):
        scan(tmp_path)


def test_splits_by_the_names_of_timm(tmp_path):
    for number in range(2):
        write(tmp_path / f"imagenet1k-train-{number:04}.tar", pairs(5, 5 * number))
        write(tmp_path / f"imagenet1k-validation-{number:02}.tar", pairs(3, 3 * number))
    (tmp_path / "_info.json").write_text('{"splits": {"train": {"name": "train", "num_samples": 10}}}')
    (tmp_path / "README.md").write_text("x")
    found = scan(tmp_path)
    assert [split.num_images for split in found.splits.values()] == [10, 6]
    assert found.origin.places == {
        "train": f"{tmp_path.name}/imagenet1k-train-*.tar",
        "val": f"{tmp_path.name}/imagenet1k-validation-*.tar",
    }
    assert {entry.kind: entry.count for entry in found.origin.left_out} == {
        READ_FOR_LABELS: 16,
        ".json files": 1,
        ".md files": 1,
    }
    alone = scan(None, train=tmp_path / "imagenet1k-train-0001.tar", val=tmp_path / "imagenet1k-validation-00.tar")
    assert [split.num_images for split in alone.splits.values()] == [5, 3]


def test_a_finished_shard_set_is_a_source(tar_set):
    found = scan(tar_set)
    assert found.classes == ("ant", "bee", "cow")
    assert [split.num_images for split in found.splits.values()] == [24, 10]


def test_what_is_a_webdataset(tmp_path):
    def is_one(files: list[tuple[str, bytes]]) -> bool:
        return is_webdataset(write(tmp_path / "t.tar", files))

    assert (
        is_one(pairs(3))
        and is_one(pairs(3)[::-1])
        and is_one([("a/1.jpg", b""), ("b/1.jpg", b""), ("b/1.cls", b""), ("a/1.cls", b"")])
    )
    assert is_one([("1.jpg", b""), ("1.json", b"")])
    assert not is_one([("a/1.jpg", b""), ("a/1.json", b""), ("b/1.jpg", b""), ("b/1.json", b"")])  # class folders
    assert not is_one([("1.jpg", b""), ("2.jpg", b""), ("2.txt", b"")])
    assert not is_one([]) and not is_one([("n01.tar", tar_bytes(pairs(2)))])
    (tmp_path / "t.tar").write_bytes(b"no tar")
    assert not is_webdataset(tmp_path / "t.tar")


def test_damaged_and_compressed_tars(tmp_path):
    import gzip

    path = write(tmp_path / "train-0.tar", pairs(30))
    good = path.read_bytes()
    write(tmp_path / "train-1.tar", pairs(3))
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"train-0\.tar: cut off: .*; copy or download it again"):
        scan(tmp_path)
    path.write_bytes(gzip.compress(good))
    with pytest.raises(UserError, match=r"train-0\.tar: compressed \(gzip\); decompress it first"):
        scan(tmp_path)


def test_fingerprints(tmp_path):
    path = write(tmp_path / "train-0.tar", pairs(6))
    before = scan(tmp_path).splits["train"].fingerprint()
    assert scan(tmp_path).splits["train"].fingerprint() == before
    path.rename(tmp_path / "train-1.tar")
    assert scan(tmp_path).splits["train"].fingerprint() != before
    write(tmp_path / "train-1.tar", pairs(6)[::-1])
    others = {before, scan(tmp_path).splits["train"].fingerprint()}
    write(tmp_path / "train-1.tar", [(name, b"0" if name == "000001.cls" else data) for name, data in pairs(6)])
    assert scan(tmp_path).splits["train"].fingerprint() not in others


def test_a_part_of_the_images(tmp_path):
    split = scan(write(tmp_path / "t.tar", pairs(9))).splits["train"]
    everything = read_all(split)
    part = split.select(np.array([1, 4, 8])).select(np.array([0, 2]))
    assert read_all(part) == [everything[1], everything[8]]
    assert part.fingerprint() != split.fingerprint()
    with pytest.raises(IndexError):
        part.relative_path(2)


def test_reading_stops_where_the_tar_was_cut_later(tmp_path):
    path = write(tmp_path / "t.tar", [("a.cls", b"1"), ("a.jpg", io.BytesIO(bytes(5000)).read())])
    location = scan(path).splits["train"].locate(0)
    with path.open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(UserError, match=r"t\.tar: a\.jpg: only 1,464 of its 5,000 bytes are left; copy .*t\.tar again"):
        location.read()
