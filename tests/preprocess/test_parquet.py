"""Parquet files as a source, compared with pyarrow and Pillow."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from container_files import features, image_bytes, images_of, parquet_bytes, write_parquet
from conversion import convert_folder
from PIL import Image

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.preprocess.encoding.encode import EncodeSettings, encode_image
from sdpnet.preprocess.sources.container_splits import ImageColumns
from sdpnet.preprocess.sources.listing import SplitImages
from sdpnet.preprocess.sources.parquet import listing, row
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.workers.pool import encode_all
from sdpnet.preprocess.workers.result import Bad

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra parquet)")
import pyarrow.parquet as pq  # noqa: E402 - after the check

NAMES = ("tench", "shark", "ray")


def labels_of(count: int) -> list[int]:
    return [(7 * number) % 3 for number in range(count)]


def read_all(split: SplitImages) -> list[tuple[str, int, bytes]]:
    return [
        (split.relative_path(index), int(split.labels[index]), split.locate(index).read())
        for index in range(split.num_images)
    ]


WRITTEN = {
    "snappy": {"compression": "snappy"},
    "zstd": {"compression": "zstd"},
    "gzip": {"compression": "gzip"},
    "brotli": {"compression": "brotli"},
    "lz4": {"compression": "lz4"},
    "none": {"compression": "none"},
    "one row in a group": {"rows": 1},
    "one group": {"rows": 1000},
    "small pages": {"rows": 1000, "data_page_size": 200, "use_dictionary": False},
    "dictionaries": {"use_dictionary": True, "rows": 1000},
    "no dictionaries": {"use_dictionary": False},
    "pages of version 2": {"data_page_version": "2.0", "rows": 7},
    "checksums": {"write_page_checksum": True},
    "format 1.0": {"version": "1.0"},
    "large_binary": {"large": True},
    "plain binary": {"is_struct": False},
    "plain large_binary": {"is_struct": False, "large": True},
    "no statistics": {"write_statistics": False},
    "an index of pages": {"write_page_index": True},
    "delta lengths": {"column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}, "use_dictionary": False},
}


@pytest.mark.parametrize("options", WRITTEN.values(), ids=WRITTEN)
def test_rows_are_those_of_pyarrow(tmp_path, options):
    """Pixels and labels of every row, in the order of the files and of the rows."""
    images = images_of(30)
    images[3] = images[17]  # a dictionary has it once
    for number in range(2):
        part = slice(15 * number, 15 * number + 15)
        path = tmp_path / f"data/train-{number:05}-of-00002.parquet"
        write_parquet(path, images[part], labels_of(30)[part], NAMES, **options)
    found = scan(tmp_path)
    train = found.splits["train"]
    expected = []
    for path in sorted((tmp_path / "data").glob("*.parquet")):
        for number, values in enumerate(pq.read_table(path).to_pylist()):
            data = values["image"]["bytes"] if isinstance(values["image"], dict) else values["image"]
            expected.append((f"{path.name}#{number}", values["label"], data))
    assert read_all(train) == expected and len(expected) == 30
    assert found.classes == NAMES
    convert_folder(found, tmp_path / "out")
    _, reader = open_split(tmp_path / "out", "train")
    for index, (_, label, data) in enumerate(expected):
        assert reader.labels[index] == label
        # The shards have the same pixels as a conversion of the image alone, whose agreement with Pillow is tested in
        # test_encode.py, and nearly those of Pillow.
        assert reader.encoded(index).tobytes() == encode_image(data, EncodeSettings()).data
        stored = np.asarray(Image.open(io.BytesIO(reader.encoded(index).tobytes())).convert("RGB"), np.float64)
        original = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)
        assert stored.shape == original.shape and np.abs(stored - original).mean() < 12


def test_rows_in_any_order(tmp_path):
    images = images_of(50)
    write_parquet(tmp_path / "train.parquet", images, labels_of(50), NAMES, rows=9)
    train = scan(tmp_path).splits["train"]
    order = np.random.default_rng(0).integers(50, size=200)
    assert [train.locate(index).read() for index in order.tolist()] == [images[index] for index in order]
    part = train.select(np.arange(1, 50, 3)).select(np.array([0, 5, 6]))
    assert [name for name, _, _ in read_all(part)] == ["train.parquet#1", "train.parquet#16", "train.parquet#19"]
    assert [data for *_, data in read_all(part)] == [images[index] for index in (1, 16, 19)]


def test_workers_read_rows(tmp_path):
    images = images_of(120)
    write_parquet(tmp_path / "train.parquet", images, labels_of(120), NAMES, rows=25)
    train = scan(tmp_path).splits["train"]
    found = [bytes(image.data) for image in encode_all(train.locate, 0, 120, EncodeSettings(), 2)]
    assert found == [encode_image(image, EncodeSettings()).data for image in images]


@pytest.mark.parametrize("columns", ["nested", "chunks"])
def test_columns_beside_the_images(tmp_path, columns):
    """Further columns are not read; a table of several chunks is one of several row groups."""
    images = images_of(12)
    extra = {
        "meta": [{"bytes": b"x", "width": [n, [n]]} if False else {"w": n} for n in range(12)],
        "a.b": list("x" * 12),
    }
    path = write_parquet(tmp_path / "t.parquet", images, labels_of(12), NAMES, extra=extra)
    if columns == "chunks":
        table = pq.read_table(path)
        pq.write_table(pa.concat_tables([table.slice(0, 5), table.slice(5)]), path, row_group_size=4)
    assert [data for *_, data in read_all(scan(path).splits["train"])] == images


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    images, labels = images_of(20), labels_of(20)
    described = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=list(NAMES)),
            "coarse_label": datasets.ClassLabel(names=list("xyz")),
        }
    )
    values = {
        "img": [{"bytes": data, "path": None} for data in images],
        "fine_label": [NAMES[label] for label in labels],
        "coarse_label": labels,
    }
    # The table that Dataset.from_dict makes. It fails itself: datasets 5.2 cannot pickle a type of pyarrow 26.
    table = pa.table(described.encode_batch(values), schema=described.arrow_schema)
    (tmp_path / "hf").mkdir()
    pq.write_table(table, tmp_path / "hf" / "train-00000-of-00001.parquet", row_group_size=7)
    found = scan(tmp_path / "hf")
    assert found.classes == NAMES
    assert [(label, data) for _, label, data in read_all(found.splits["train"])] == list(
        zip(labels, images, strict=True)
    )


LABELS = {
    "names": ([0, 2, 1], NAMES, {}, NAMES, [0, 2, 1]),
    "integers": ([0, 2, 1], None, {}, ("0", "1", "2"), [0, 2, 1]),
    "a gap": ([0, 4, 1], None, {}, ("0", "1", "2", "3", "4"), [0, 4, 1]),
    "uint8": ([0, 2, 1], None, {"label_type": "uint8"}, ("0", "1", "2"), [0, 2, 1]),
    "texts": (["ray", "ant", "ray"], None, {}, ("ant", "ray"), [1, 0, 1]),
    "large texts": (["ray", "ant", "ray"], None, {"label_type": "large_string"}, ("ant", "ray"), [1, 0, 1]),
    "texts in every other batch": (["b", "a"] * 40_000, None, {"rows": 30_000}, ("a", "b"), [1, 0] * 40_000),
    "a dictionary": (["ray", "ant", "ray"], None, {"dictionary": True}, ("ant", "ray"), [1, 0, 1]),
    "features of integers": ([0, 1, 1], None, {"metadata": features(None)}, ("0", "1"), [0, 1, 1]),
    "damaged features": ([0, 1, 1], None, {"metadata": "{"}, ("0", "1"), [0, 1, 1]),
    "deep features": ([0, 1, 1], None, {"metadata": "[" * 100_000}, ("0", "1"), [0, 1, 1]),
    "odd features": ([0, 1, 1], None, {"metadata": '{"info": {"features": [1]}}'}, ("0", "1"), [0, 1, 1]),
}


@pytest.mark.parametrize(("labels", "names", "options", "classes", "expected"), LABELS.values(), ids=LABELS)
def test_labels(tmp_path, labels, names, options, classes, expected):
    options = dict(options)
    if options.pop("dictionary", False):
        options["label_type"] = pa.dictionary(pa.int32(), pa.string())
    elif "label_type" in options:
        options["label_type"] = getattr(pa, options["label_type"])()
    found = scan(write_parquet(tmp_path / "t.parquet", [b"x"] * len(labels), labels, names, **options))
    assert found.classes == classes
    assert found.splits["train"].labels.tolist() == expected


def test_val_has_the_classes_of_train(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", images_of(3), [0, 1, 2], NAMES)
    val = tmp_path / "validation-0.parquet"
    write_parquet(val, images_of(3), [0, 1, 2], ("ray", "tench", "shark"))
    write_parquet(tmp_path / "test-0.parquet", images_of(1), [-1], NAMES)
    found = scan(tmp_path)
    assert found.splits["val"].labels.tolist() == [2, 0, 1]
    assert found.origin.places == {
        "train": f"{tmp_path.name}/train-0.parquet (image, label)",
        "val": f"{tmp_path.name}/validation-0.parquet (image, label)",
    }
    assert [(entry.kind, entry.count) for entry in found.origin.left_out] == [(".parquet files", 1)]
    write_parquet(val, images_of(2), [2, 0])
    assert scan(tmp_path).splits["val"].labels.tolist() == [2, 0]
    write_parquet(val, images_of(2), ["ray", "tench"])
    assert scan(tmp_path).splits["val"].labels.tolist() == [2, 0]
    for labels, names, message in (
        ([0, 3], None, r"validation-0\.parquet: label 3, but train has 3 classes"),
        ([0, 1], ("ray", "sharks"), r"train has no class 'sharks'; did you mean 'shark'\?"),
        (["ray", "cod"], None, r"train has no class 'cod'"),
    ):
        write_parquet(val, images_of(2), labels, names)
        with pytest.raises(UserError, match=message):
            scan(tmp_path)


COLUMNS = {
    "no images": (
        {"image": "x", "is_struct": False, "images": None},
        r"no column with bytes of images .*, but 'label', ",
    ),
    "two images": (
        {"image": "a", "extra": {"b": [b"x"]}},
        r"images may be in several columns: 'a', 'b'; choose one with --image-column",
    ),
    "no labels": ({"labels": [1.5]}, r"no column with labels \(integers or texts\), but 'image', 'label'; name a file"),
    "two labels": (
        {"label": "x", "extra": {"y": [1]}},
        r"labels may be in several columns: 'x', 'y'; choose one with --label-column",
    ),
    "two usual labels": ({"extra": {"cls": [1]}}, r"labels may be in several columns: 'label', 'cls'; choose one"),
}


@pytest.mark.parametrize(("options", "message"), COLUMNS.values(), ids=COLUMNS)
def test_columns_that_are_not_clear(tmp_path, options, message):
    options = dict(options)
    labels = options.pop("labels", [0])
    path = write_parquet(tmp_path / "t.parquet", [b"x"], labels, **{k: v for k, v in options.items() if k != "images"})
    if "images" in options:
        pq.write_table(pa.table({"label": [0], "caption": ["x"]}), path)
    with pytest.raises(UserError, match=rf"t\.parquet: (the )?{message}"):
        scan(path)


def test_columns_by_name_and_by_type(tmp_path):
    for options, columns, names in (
        ({"image": "jpg", "label": "cls", "extra": {"other": [b"x"], "width": [1]}}, (None, None), "jpg, cls"),
        ({"image": "photo", "label": "kind"}, (None, None), "photo, kind"),
        ({"image": "photo", "label": "kind", "extra": {"id": [1]}}, (None, "kind"), "photo, kind"),
        ({"image": "Image", "label": "Label", "extra": {"id": [1]}}, (None, None), "Image, Label"),
        ({"label": "fine_label", "extra": {"coarse_label": [1]}}, (None, None), "image, fine_label"),
        ({"label": "fine_label", "extra": {"coarse_label": [1]}}, (None, "coarse_label"), "image, coarse_label"),
        ({"extra": {"thumb": [b"x"]}}, ("thumb", None), "thumb, label"),
        ({"extra": {"__index_level_0__": [1]}, "label": "y"}, (None, None), "image, y"),
    ):
        path = write_parquet(tmp_path / "t.parquet", [b"y"], [0], **options)
        assert scan(path, columns=ImageColumns(*columns)).origin.places == {"train": f"t.parquet ({names})"}
    write_parquet(
        path,
        [b"y"],
        [0],
        metadata=features(["a"], "photo", "kind"),
        image="photo",
        label="kind",
        extra={"image": [b"x"], "label": [0]},
    )
    assert scan(path).origin.places == {"train": "t.parquet (photo, kind)"}  # the features are marked
    for columns, message in (
        (("phot", None), r"--image-column phot: no such column; did you mean 'photo'\?"),
        (("kind", None), r"--image-column kind: has no bytes of images; columns that have them: 'photo', 'image'"),
        ((None, "photo"), r"--label-column photo: has no integers or texts"),
    ):
        with pytest.raises(UserError, match=rf"t\.parquet: {message}"):
            scan(path, columns=ImageColumns(*columns))


def test_flags_of_columns_need_parquet(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(image_bytes(0))
    with pytest.raises(UserError, match="--image-column, --label-column: the source has no Parquet files; omit"):
        scan(tmp_path, columns=ImageColumns("image"))


BAD = {
    "a null label": (
        dict(labels=[0, None, 1]),
        r"row 1 has no label \(null in 'label'\); fill it, or remove such rows",
    ),
    "no label": (dict(labels=[0, 1, -1]), r"row 2: label -1, must be 0 to 999,999 \('label'\); rows without a label"),
    "a huge label": (dict(labels=[0, 2**60, 1]), r"row 1: label 1152921504606846976, must be 0 to 999,999"),
    "too few names": (dict(labels=[0, 5, 1], names=NAMES), "label 5, but the classes have 3 names; give all of them"),
    "a name twice": (dict(labels=[0, 1, 0], names=("a", "a")), r"'label': 'a' is the name of two classes \(0 and 1\)"),
    "a name of another type": (
        dict(labels=[0, 1, 0], names=("a", 3)),
        r"'label': the name of class 1 is 3, must be 1 to",
    ),
    "an empty text": (
        dict(labels=["a", "", "b"]),
        r"'label': the name of class 0 is '', must be 1 to 1,000 characters",
    ),
    "paths": (
        dict(labels=[0, 1, 2], paths=True),
        r"row 0 has no bytes of its image but only the path '0\.jpg'; write the",
    ),
    "no rows": (dict(labels=[]), r"no rows in it; download them again"),
}


@pytest.mark.parametrize(("made", "message"), BAD.values(), ids=BAD)
def test_one_line_names_the_file(tmp_path, made, message):
    labels, names = made["labels"], made.get("names")
    path = tmp_path / "t.parquet"
    if made.get("paths"):
        images = pa.array(
            [{"bytes": None, "path": f"{n}.jpg"} for n in range(3)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        pq.write_table(pa.table({"image": images, "label": labels}), path)
    else:
        kind = {} if labels else {"label_type": pa.int64()}
        write_parquet(path, [b"x"] * len(labels), labels, names, **kind)
    with pytest.raises(UserError, match=rf"t\.parquet: {message}"):
        scan(path)


def test_a_row_without_an_image_is_bad(tmp_path):
    images = [image_bytes(0), None, image_bytes(2), b"", b"no image"]
    for is_struct in (True, False):
        path = write_parquet(tmp_path / "t.parquet", images, [0, 1, 2, 0, 1], NAMES, is_struct=is_struct)
        train = scan(path).splits["train"]
        found = list(encode_all(train.locate, 0, 5, EncodeSettings(), 1))
        assert [isinstance(result, Bad) for result in found] == [False, True, False, True, True]
        assert found[1] == Bad("no image (null); fill it or remove the row")
        assert found[3] == Bad("empty (0 bytes); copy it again or remove it")


def test_files_that_do_not_fit_together(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", images_of(2), [0, 1], NAMES)
    for options, message in (
        (
            {"names": NAMES, "label": "cls"},
            r"other columns \('image' and 'cls'\) than train-0\.parquet; name only files",
        ),
        ({"names": ("tench", "shark", "cod")}, r"other class names than train-0\.parquet"),
        ({"names": None}, r"other class names than train-0\.parquet"),
        ({"names": NAMES, "is_struct": False}, r"other types of columns than train-0\.parquet"),
    ):
        write_parquet(tmp_path / "train-1.parquet", images_of(2), [0, 1], **options)
        with pytest.raises(UserError, match=rf"train-1\.parquet: {message}"):
            scan(tmp_path)
    (tmp_path / "train-1.parquet").unlink()
    write_parquet(tmp_path / "train-1.parquet", images_of(2), [0, 1], NAMES, compression="zstd", large=True)
    assert scan(tmp_path).splits["train"].num_images == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_page_costs_its_rows(tmp_path, workers):
    """Good rows before the damage are converted; the reason of all others names what is wrong."""
    images = images_of(40)
    path = write_parquet(
        tmp_path / "t.parquet",
        images,
        labels_of(40),
        NAMES,
        rows=20,
        use_dictionary=False,
        data_page_size=1000,
        write_batch_size=2,
        write_statistics=False,
        write_page_checksum=True,
        compression="none",
    )
    content = bytearray(path.read_bytes())
    at = bytes(content).index(images[13])
    content[at + 50] ^= 255
    path.write_bytes(content)
    train = scan(path).splits["train"]
    found = list(encode_all(train.locate, 0, 40, EncodeSettings(), workers))
    bad = [index for index, result in enumerate(found) if isinstance(result, Bad)]
    assert bad and bad == list(range(bad[0], 20)) and 0 < bad[0] <= 13
    reasons = {result.reason for result in found if isinstance(result, Bad)}
    assert len(reasons) == 1 and "cannot be read" in reasons.pop()


def test_changes_after_the_listing(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", images_of(8), labels_of(8), NAMES)
    train = scan(path).splits["train"]
    row._open = None
    write_parquet(path, images_of(2), labels_of(2), NAMES)
    with pytest.raises(UserError, match=r"t\.parquet: row 7: cannot be read \("):
        train.locate(7).read()
    path.unlink()
    with pytest.raises(UserError, match=r"t\.parquet: row 0: cannot be read \(.*No such file"):
        train.locate(0).read()
    path.mkdir()
    with pytest.raises(UserError, match=r"t\.parquet: row 5: a folder, not a file"):
        train.locate(5).read()


def test_larger_than_the_limit(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", [bytes(2_000_001)], [0])
    with pytest.raises(UserError, match=r"row 0: 2,000,001 bytes, more than the 2,000,000 of --max-file-mb"):
        scan(path).splits["train"].locate(0).read(2_000_000)


def test_a_dictionary_does_not_fill_the_memory(tmp_path):
    """A file of 1 MB with one value in 30,000 rows, which are 30 GB, is read in a few of them at a time."""
    path = write_parquet(tmp_path / "t.parquet", [bytes(1 << 20)] * 300, [0] * 300, rows=300, compression="none")
    assert path.stat().st_size < 2 << 20
    train = scan(path).splits["train"]
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    for index in (0, 150, 299):
        assert train.locate(index).read() == bytes(1 << 20)
        assert pa.total_allocated_bytes() - before < 200 << 20
    row._open = None


def test_fingerprints(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", images_of(6), labels_of(6), NAMES)
    seen = {scan(tmp_path).splits["train"].fingerprint()}
    assert seen == {scan(tmp_path).splits["train"].fingerprint()}
    for options in ({"names": NAMES[::-1]}, {"names": NAMES, "rows": 2}, {"names": NAMES, "compression": "zstd"}):
        write_parquet(path, images_of(6), labels_of(6), **options)
        seen.add(scan(tmp_path).splits["train"].fingerprint())
    write_parquet(path, images_of(6), labels_of(6)[::-1], NAMES)
    seen.add(scan(tmp_path).splits["train"].fingerprint())
    assert len(seen) == 5


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" * 3, b"no parquet at all", b"PAR1\xff\xff\xff\x7fPAR1", bytes(100)]
)
def test_no_parquet_file(tmp_path, content):
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet: not a complete Parquet file .*; download it again"):
        scan(tmp_path)
    with pytest.raises(UserError, match=r"train\.parquet: not a complete Parquet file"):
        scan(None, train=tmp_path / "train.parquet")


def test_crashes_and_endless_work_of_pyarrow_are_survived(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "t.parquet", images_of(1), [0])
    real = listing.subprocess.Popen
    for code, message in (
        ("import os; os.abort()", r"t\.parquet: crashes pyarrow \(SIGABRT\); copy or download it again"),
        ("import signal, os; os.kill(os.getpid(), signal.SIGPROF)", r"t\.parquet: takes more than 8 s to list"),
        ("import signal, os; os.kill(os.getpid(), signal.SIGKILL)", r"ended by SIGKILL \(out of memory\?\)"),
        ("raise SystemExit(1)", r"cannot run \(status 1\); see its message above"),
    ):
        monkeypatch.setattr(
            listing.subprocess, "Popen", lambda _, code=code, **options: real([sys.executable, "-c", code], **options)
        )
        with pytest.raises(UserError, match=message):
            scan(path)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "t.parquet", images_of(1), [0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError) as caught:
        scan(path)
    assert str(caught.value) == f"{path}: Parquet files need pyarrow; to install it: {install_extra('parquet')}"


def test_a_file_without_the_suffix(tmp_path):
    path = tmp_path / "0b1c2d"  # the cache of huggingface_hub names files by their hash
    path.write_bytes(parquet_bytes(images_of(2), [0, 1]))
    assert scan(None, train=Path(path)).splits["train"].num_images == 2
