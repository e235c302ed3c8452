from __future__ import annotations

import gzip
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from special_files import SPECIAL_FILES

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.labels import read_labels
from sdpnet.preprocess.sources.synsets import read_synsets

CLASSES = ("n01", "n02", "n03", "n04")
NAMES = ["ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]
STEMS = [name.removesuffix(".JPEG") for name in NAMES]
EXPECTED = [2, 0, 3]  # of NAMES


def labels_of(tmp_path: Path, text: str, *, name: str = "labels.txt", synsets: str | None = None, **given) -> list[int]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    if synsets is not None:
        (tmp_path / "synsets.txt").write_text(synsets)
        given["synsets"] = tmp_path / "synsets.txt"
    arguments = {"names": NAMES, "classes": CLASSES} | given
    labels = read_labels(path, Path("val"), **arguments)
    assert labels.dtype == np.int32
    return labels.tolist()


def fails(tmp_path: Path, text: str, **given) -> str:
    with pytest.raises(UserError) as caught:
        labels_of(tmp_path, text, **given)
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    return message


def lines(template: str, labels: list[object]) -> str:
    return "".join(template.format(stem=stem, label=label) + "\n" for stem, label in zip(STEMS, labels, strict=True))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "template",
    [
        "{stem}.JPEG {label}",
        "{stem}\t{label}",
        "val/{stem}.JPEG   {label}",
        "./data/val/{stem} {label}",
        "{stem}.jpg,{label}",
        "val/{stem}.JPEG, {label}",
        '"{stem}","{label}"',
    ],
)
def test_files_with_class_names_or_places(tmp_path, template, newline):
    for values in (["n03", "n01", "n04"], EXPECTED):
        text = lines(template, values).replace("\n", newline)
        assert labels_of(tmp_path, text) == EXPECTED
        assert labels_of(tmp_path, text, name="labels.csv") == EXPECTED
        assert labels_of(tmp_path, "\ufeff" + text.rstrip() + newline * 2) == EXPECTED


def test_a_header_line(tmp_path):
    for header in ("file,label", "ImageId,PredictionString"):
        assert labels_of(tmp_path, f"{header}\n" + lines("{stem},{label}", EXPECTED)) == EXPECTED
    assert labels_of(tmp_path, "filename label\n" + lines("{stem} {label}", EXPECTED)) == EXPECTED


def test_kaggle(tmp_path):
    """LOC_val_solution.csv: each box is `wnid x0 y0 x1 y1`, and an image may have several."""
    text = lines("{stem},{label} 85 1 499 272 {label} 3 4 5 6 ", ["n03", "n01", "n04"])
    assert labels_of(tmp_path, "ImageId,PredictionString\n" + text, name="LOC_val_solution.csv") == EXPECTED
    message = fails(tmp_path, text.replace("00000003", "00000009"))
    assert "1 of 3 files are not in val, first 'ILSVRC2012_val_00000009' (line 1)" in message


def test_class_names_alone_are_in_the_order_of_the_images_names(tmp_path):
    assert labels_of(tmp_path, "n01\nn04\nn03\n") == EXPECTED
    classes = ("great white, shark", "kit fox", "red fox")
    assert labels_of(tmp_path, "kit fox\nred fox\ngreat white, shark\n", classes=classes) == [0, 1, 2]


def test_class_names_with_spaces_beside_files(tmp_path):
    classes = ("great white", "kit fox", "red fox")
    text = lines("{stem} {label}", ["kit fox", "red fox", "great white"])
    assert labels_of(tmp_path, text, classes=classes) == [1, 2, 0]


PHOTOS = ["my photo 1.jpg", "my photo 10.jpg", "my.jpg", "a, b.png", "über uns.jpg"]
PHOTO_CLASSES = ("cat", "great white, shark", "photo", "red fox")


@pytest.mark.parametrize("form", ["{name} {label}", "{name}\t{label}", "val/{name}   {label}", '"{name}" {label}'])
@pytest.mark.parametrize("suffix", [True, False])
def test_spaces_in_names_and_classes(tmp_path, form, suffix):
    expected = [3, 1, 0, 2, 3]
    names = [name if suffix else name.rsplit(".", 1)[0] for name in PHOTOS]
    for labels in ([PHOTO_CLASSES[label] for label in expected], expected):
        text = "".join(form.format(name=name, label=label) + "\n" for name, label in zip(names, labels, strict=True))
        assert labels_of(tmp_path, text, names=PHOTOS, classes=PHOTO_CLASSES) == expected
    rows = "".join(f'"{name}","{PHOTO_CLASSES[label]}"\n' for name, label in zip(names, expected, strict=True))
    assert labels_of(tmp_path, "file name,class\n" + rows, names=PHOTOS, classes=PHOTO_CLASSES) == expected


def test_spaces_where_several_readings_are_possible(tmp_path):
    """Of "my photo 1.jpg cat" the image is the longest one that leaves a class behind it."""
    names = ["my", "my photo", "my photo 1.jpg"]
    classes = ("cat", "photo 1.jpg cat", "photo cat")
    text = "my photo 1.jpg cat\nmy photo cat\nmy photo 1.jpg cat\n"
    assert "'my photo 1.jpg' is listed twice (lines 1 and 3)" in fails(tmp_path, text, names=names, classes=classes)
    assert labels_of(tmp_path, "my photo 1.jpg cat\nmy photo cat\nmy cat\n", names=names, classes=classes) == [0, 0, 0]


def test_boxes_behind_labels_and_names_of_windows(tmp_path):
    names = ["val_0.JPEG", "val_1.JPEG"]
    text = "val_0.JPEG\tn02\t0\t32\t44\t62\nval_1.JPEG\tn01\t52\t55\t57\t59\n"  # Tiny ImageNet
    assert labels_of(tmp_path, text, names=names) == [1, 0]
    assert labels_of(tmp_path, "data\\val\\val_0.JPEG n02\ndata\\val\\val_1.JPEG n01\n", names=names) == [1, 0]


def test_accents_are_the_same_composed_and_decomposed(tmp_path):
    names = ["u\u0308ber.jpg", "\u00e9t\u00e9.jpg"]  # as macOS and as others write them
    text = "\u00fcber.jpg n02\ne\u0301te\u0301 n01\n"
    assert labels_of(tmp_path, text, names=names) == [1, 0]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("ILSVRC2012_val_00000009 wolf", r"first 'ILSVRC2012_val_00000009' \(line 1\)"),
        ("other.jpg,n05", r"1 of 4 files are not in val, first 'other\.jpg' \(line 1\); .* header, remove it"),
        ("dateiname,klasse", r"first 'dateiname' \(line 1\); .* if line 1 is a header, remove it"),
    ],
)
def test_a_first_line_that_is_no_header(tmp_path, first, message):
    form = "{stem},{label}" if "," in first else "{stem} {label}"
    text = f"{first}\n" + lines(form, EXPECTED)
    assert re.search(message, fails(tmp_path, text))


@pytest.mark.parametrize("header", ["Image_ID,Class Name", "id,label", "path,target", "x,class", '"file","synset"'])
def test_usual_headers(tmp_path, header):
    assert labels_of(tmp_path, f"{header}\n" + lines("{stem}.JPEG,{label}", ["n03", "n01", "n04"])) == EXPECTED


def test_a_header_above_labels_alone(tmp_path):
    assert labels_of(tmp_path, "label\nn01\nn04\nn03\n") == EXPECTED
    assert "4 labels, but val has 3 images" in fails(tmp_path, "wolf\nn01\nn04\nn03\n")
    assert labels_of(tmp_path, "label\nn01\nn04\n", classes=(*CLASSES, "label")) == [3, 4, 0]  # a class, no header


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_gets_a_remedy(tmp_path, encoding):
    path = tmp_path / "labels.txt"
    path.write_bytes(lines("{stem} {label}", EXPECTED).encode(encoding))
    with pytest.raises(
        UserError, match=r"not a text file in UTF-8 but in UTF-\d+.*; save it as UTF-8, or .*iconv -f UTF"
    ):
        read_labels(path, Path("val"), NAMES, CLASSES)


def test_latin_1_gets_a_remedy(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"1.jpg cat\n\xfcber.jpg dog\n")
    with pytest.raises(UserError, match=r"not a text file in UTF-8 \(line 2\); .*iconv -f LATIN1"):
        read_labels(path, Path("val"), NAMES, CLASSES)


def test_integers_alone_from_0(tmp_path):
    assert labels_of(tmp_path, "0\n3\n2\n") == EXPECTED


def test_ids_mean_what_the_synsets_say(tmp_path):
    """ID 1 is n04, 2 is n01, 3 is n03, 4 is n02."""
    in_order = "n04\nn01\nn03\nn02\n"
    numbered = "n02 4 kit_fox\nn04 1 dog\nn01 2 cat\nn03 3 cow\n"
    for synsets in (in_order, numbered):
        assert labels_of(tmp_path, "2\n1\n3\n", synsets=synsets) == EXPECTED
        assert labels_of(tmp_path, lines("{stem}.JPEG {label}", [3, 2, 1]), synsets=synsets) == EXPECTED
    assert labels_of(tmp_path, "4\n4\n4\n", synsets=in_order) == [1, 1, 1]
    assert "line 2: ID 5 is not among the 4 that --synsets names" in fails(tmp_path, "2\n5\n3\n", synsets=in_order)
    assert "line 2: ID 0 is not among" in fails(tmp_path, "2\n0\n3\n", synsets=in_order)
    message = fails(tmp_path, "2\n1\n3\n", synsets=in_order, classes=("n01", "n02", "n03"))
    assert "line 2: ID 1: train has no class 'n04'; did you mean" in message


def test_integers_that_are_class_names(tmp_path):
    assert labels_of(tmp_path, "10\n2\n1\n", classes=("1", "10", "2")) == [0, 1, 2]


def test_integers_that_could_mean_two_things(tmp_path):
    message = fails(tmp_path, "1\n4\n3\n")
    assert "labels up to 4 and no 0: ILSVRC2012's IDs" in message and "--synsets" in message
    assert "labels up to 4 and no 0" in fails(tmp_path, lines("{stem} {label}", [1, 4, 3]))
    message = fails(tmp_path, "1\n3\n2\n")
    assert "labels from 1 to 3 for 4 classes may count from 0 or from 1" in message and "--synsets" in message
    assert "line 2: label 5, but train has 4 classes" in fails(tmp_path, "1\n5\n2\n")
    assert "line 2: label 4, but train has 4 classes" in fails(tmp_path, "0\n4\n2\n")
    # With its file beside it, an integer is Caffe's: from 0.
    assert labels_of(tmp_path, lines("{stem} {label}", [1, 3, 2])) == [1, 3, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "labels.txt: empty; write FILE LABEL in each line"),
        ("\n \n", "labels.txt: empty; write FILE LABEL in each line"),
        ("n01\n\nn04\nn03\n", "line 2 is empty"),
        ("n01\nn04\n", "2 labels, but val has 3 images; each needs one"),
        ("n01\nn04\nn03\nn01\n", "4 labels, but val has 3 images"),
        ("n01\nn4\nn03\n", r"line 2: train has no class 'n4'; did you mean 'n04'\?"),
        ("n01\nn04\n3\n", "line 3: train has no class '3'"),
        ("0\n1\nx\n", "line 3: 'x' is not an integer, unlike the other labels"),
        ("0\n1\n-1\n", "line 3: '-1' is not an integer"),
        (lines("{stem} {label}", ["n03", "n01", "wolf"]), "line 3: train has no class 'wolf'; there are n01, n02"),
        (lines("{stem} {label}", EXPECTED) + "x.jpg 1\n", r"1 of 4 files are not in val, first 'x\.jpg' \(line 4\)"),
        (lines("{stem} {label}", EXPECTED) + f"{STEMS[1]}.JPEG 0\n", r"00001\.JPEG' is listed twice \(lines 2 and 4\)"),
        (f"{STEMS[1]} 0\n", "no label for 2 of the 3 images of val, first 'ILSVRC2012_val_00000002.JPEG'"),
        (f"{STEMS[1]},0\n{STEMS[0]}\n", "line 2 is 'ILSVRC2012_val_00000003', must be FILE,LABEL"),
        (f"{STEMS[1]} 0\n{STEMS[0]}\n", "line 2 is 'ILSVRC2012_val_00000003', must be FILE LABEL"),
        (f"{STEMS[1]},0,1\n", "line 1 is '.*', must be FILE,LABEL"),
        (f"{STEMS[1]},0\n{'x' * 140000},1\n", r"line 2 is '\[...\]', must be FILE,LABEL"),
        ("file,label\n", "no label for 3 of the 3 images"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        labels_of(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'labels.txt'}: ") and "\n" not in str(caught.value)


def test_a_suffix_decides_between_images_of_one_stem(tmp_path):
    names = ["a.jpg", "a.png", "b.v1.jpg"]
    assert labels_of(tmp_path, "a.png 0\nb.v1 1\na.jpg 2\n", names=names) == [2, 0, 1]
    assert "2 of 3 files are not in val, first 'a' (line 1)" in fails(tmp_path, "a 0\na 1\nb.v1.jpg 2\n", names=names)


def test_files_that_are_no_labels(tmp_path):
    path = tmp_path / "labels.txt"
    for content in (b"\xff\xfe\xff", b"a\0b"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"labels\.txt: not a text file in UTF-8"):
            read_labels(path, Path("val"), NAMES, CLASSES)
    with pytest.raises(UserError, match=r"nowhere: cannot be read \(No such file or directory\)"):
        read_labels(tmp_path / "nowhere", Path("val"), NAMES, CLASSES)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"x\.tar\.gz: has no ILSVRC2012_validation_ground_truth\.txt in it"):
        read_labels(tmp_path / "x.tar.gz", Path("val"), NAMES, CLASSES)


def test_a_semicolon_separates_as_well(tmp_path):
    """As Excel writes CSV where numbers have a decimal comma."""
    values = ["n03", "n01", "n04"]
    assert labels_of(tmp_path, lines("{stem}.JPEG;{label}", values)) == EXPECTED
    assert labels_of(tmp_path, "file;label\r\n" + lines('"{stem}.JPEG";"{label}"', values)) == EXPECTED
    assert labels_of(tmp_path, lines("{stem} {label}", ["a;b", "n", "n"]), classes=("a;b", "n")) == [0, 1, 1]


def test_empty_lines_between_files(tmp_path):
    text = lines("{stem} {label}", ["n03", "n01", "wolf"]).replace("\n", "\n\n")
    assert labels_of(tmp_path, "\n" + text.replace("wolf", "n04")) == EXPECTED
    assert "line 6: train has no class 'wolf'" in fails(tmp_path, "\n" + text)


def test_accents_of_classes_however_they_are_written(tmp_path):
    text = lines("{stem} {label}", ["cafe\u0301", "b", "b"])
    assert labels_of(tmp_path, text, classes=("b", "caf\u00e9")) == [1, 0, 0]


@pytest.mark.parametrize("kind", ["named pipe", "link to /dev/zero", "sparse terabyte", "folder"])
@pytest.mark.parametrize("name", ["val.txt", "kit.tar.gz", "meta.mat"])
def test_special_files_are_no_labels(tmp_path, kind, name):
    """They are refused before they are read: reading some of them has no end."""
    path = tmp_path / name
    SPECIAL_FILES[kind](path)
    with pytest.raises(UserError, match=f"{name}: "):
        read_labels(path, tmp_path, ["1.jpg"], ["a"])
    with pytest.raises(UserError, match=f"{name}: "):
        read_synsets(path)


def test_a_development_kit_that_unpacks_to_very_much(tmp_path):
    path = tmp_path / "kit.tar.gz"
    with gzip.open(path, "wb", 9) as file:
        header = tarfile.TarInfo("x")
        header.size = 1 << 30
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(129):
            file.write(bytes(1 << 20))
    with pytest.raises(UserError, match=r"kit\.tar\.gz: cannot be read \(it unpacks to more than"):
        read_labels(path, tmp_path, ["1.jpg"], ["a"])
