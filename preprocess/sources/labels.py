"""Reads the labels of validation images that are not in class folders.

Each line of the file has one of these forms:

    FILE LABEL, FILE,LABEL or FILE;LABEL   The suffix and the folders of FILE do not matter. FILE and LABEL may contain
                                           spaces. Empty lines and a first line with column names are skipped.
                                           LOC_val_solution.csv has this form.
    LABEL                                  Line i has the label of the i-th image, ordered by name.

LABEL is a class name, an index into the sorted class names, from 0 (Caffe's val.txt), or an ILSVRC2012 ID, from 1
(ILSVRC2012_validation_ground_truth.txt, which is also in the packed development kit).
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import UserError, nearest
from sdpnet.preprocess.sources.files.file_kinds import IMAGE_SUFFIXES, has_image_suffix
from sdpnet.preprocess.sources.synsets import is_devkit, read_devkit, read_synsets, read_text

__all__ = ["read_labels"]

_MAX_SPLITS: Final = 64  # the number of spaces of a line at which a split is tried; Kaggle's boxes come after them
_COLUMN_NAMES: Final = """
file files filename filepath fname image images imageid imagename imagepath imagefile img imgid imgname imgpath id name
path uri sample photo picture
label labels labelid labelname class classes classid classname classlabel category categoryid categoryname
target targets groundtruth gt y synset wnid species prediction predictionstring
"""
Row = tuple[int, str, str]  # line number, file ("" if the line number identifies the image), label


def read_labels(
    path: Path, root: Path, names: Sequence[str], classes: Sequence[str], synsets: Path | None = None
) -> np.ndarray:
    """Returns the labels of the images: int32 (len(names),), indices into `classes`.

    If all labels are integers, they are class names if each one is the name of a class, and IDs if `synsets` is given.
    Otherwise they are indices from 0, unless they may be IDs. That is the case if the largest is `len(classes)`, or if
    the lines have no file names and no label is 0; then an error is raised instead of a guess.

    Args:
        path: the file of labels, or the packed development kit.
        root: the folder or archive of the images, for messages.
        names: the file names of the images, without duplicates.
        classes: class names in label order.
        synsets: the file with the class of each ID; see `sdpnet.preprocess.sources.synsets.read_synsets`.

    Raises:
        UserError: the file cannot be read, a class is unknown, integers are ambiguous, an image has no label or two,
            or a label has no image. The message names the file and, if possible, the line.
    """
    ids: dict[int, str] | None = None
    if is_devkit(path):
        text, ids = read_devkit(path)
    else:
        text = read_text(path)
        ids = None if synsets is None else read_synsets(synsets)
    images = _Images(names)
    rows = _rows(path, text, images, len(names), set(classes))
    if not rows or rows[0][1]:
        places = _places(path, root, rows, names, images)
    else:
        if len(rows) != len(names):
            raise UserError(f"{path}: {len(rows):,} labels, but {root} has {len(names):,} images; each needs one")
        places = sorted(range(len(names)), key=names.__getitem__)
    labels = np.empty(len(names), np.int32)
    labels[places] = _numbers(path, rows, classes, ids)
    return labels


class _Images:
    """Finds the image that FILE of a line refers to. Its suffix and folders are ignored if the rest is unique."""

    def __init__(self, names: Sequence[str]) -> None:
        self._by_name: dict[str, int] = {}
        self._by_stem: dict[str, int | None] = {}
        for place, name in enumerate(names):
            for form in {name, unicodedata.normalize("NFC", name)}:  # macOS decomposes accents
                self._by_name.setdefault(form, place)
            stem = os.path.splitext(unicodedata.normalize("NFC", name))[0]
            self._by_stem[stem] = None if stem in self._by_stem else place  # None: two names differ only in the suffix

    def place(self, file: str) -> int | None:
        """The index into `names` of the image; None if there is no such image."""
        for name in (file.rsplit("/", 1)[-1], re.split(r"[/\\]", file)[-1]):
            if name in self._by_name:
                return self._by_name[name]
            name = unicodedata.normalize("NFC", name)
            stem, suffix = os.path.splitext(name)
            found = self._by_name.get(name, self._by_stem.get(stem if suffix.lower() in IMAGE_SUFFIXES else name))
            if found is not None:
                return found
        return None


def _rows(path: Path, text: str, images: _Images, num_images: int, classes: set[str]) -> list[Row]:
    """The file and the label of each line, without a header.

    The form is chosen for the whole file, not for each line, because single lines are ambiguous: a label may contain
    commas and spaces. CSV is chosen if more of its file names belong to images than with a split at white space.
    """
    numbered = {number: line.strip() for number, line in enumerate(text.rstrip().split("\n"), 1)}
    empty = [number for number, line in numbered.items() if not line]
    if len(empty) == len(numbered):
        raise UserError(f"{path}: empty; write FILE LABEL in each line")
    numbered = {number: line for number, line in numbered.items() if line}
    lines = list(numbered.values())
    num_classes = sum(line in classes for line in lines)
    is_one_word = len(lines[0].split()) == 1 and not set(",;").intersection(lines[0]) and images.place(lines[0]) is None
    if 2 * num_classes > len(lines) or is_one_word:
        if empty:  # the line number identifies the image, so an empty line cannot be skipped
            raise UserError(f"{path}: line {empty[0]} is empty; remove it, or write what is missing")
        rows = [(number, "", line) for number, line in numbered.items()]
        has_header = len(lines) == num_images + 1 and _is_header("", lines[0], classes)
        return rows[1:] if has_header else rows
    spaces = [_split(line, images, classes) for line in lines]
    fields, form = spaces, "FILE LABEL"
    # Excel writes CSV with semicolons in languages whose numbers have a decimal comma.
    delimiter = ";" if ";" in lines[0] and "," not in lines[0] else ","
    if any(delimiter in line for line in lines):
        commas = [_split_csv(line, delimiter) for line in lines]
        known = [sum(images.place(file) is not None for file, _ in each) for each in (commas, spaces)]
        if known[0] > known[1] or (known[0] == known[1] and delimiter in lines[0]):
            fields, form = commas, f"FILE{delimiter}LABEL"
    rows = []
    for (number, line), (file, label) in zip(numbered.items(), fields, strict=True):
        if not file or not label:
            raise UserError(f"{path}: line {number} is {shorten(line, 80)!r}, must be {form}")
        rows.append((number, file, label))
    _, file, label = rows[0]
    return rows[1:] if images.place(file) is None and _is_header(file, label, classes) else rows


def _is_header(file: str, label: str, classes: set[str]) -> bool:
    """Whether the fields of the first line are column names: at least one must be in _COLUMN_NAMES."""
    if not label:
        return False
    if {label, label.split()[0]} & classes:
        return False
    file, label = (re.sub("[^a-z]", "", field.lower()) if field.isascii() else "" for field in (file, label))
    return not {file, label}.isdisjoint(_COLUMN_NAMES.split())


def _split_csv(line: str, delimiter: str) -> tuple[str, str]:
    """FILE and LABEL of a line of a CSV file; both empty if the line does not have exactly these two fields."""
    try:
        file, label = next(csv.reader([line], delimiter=delimiter))
    except (csv.Error, ValueError):  # for example a field of more than 131,072 characters
        return "", ""
    return file.strip(), label.strip()


def _split(line: str, images: _Images, classes: set[str]) -> tuple[str, str]:
    """FILE and LABEL of a line, separated by white space; both empty if there is none.

    FILE and LABEL may contain white space themselves. Of all possible splits, the best has an image before it and a
    label after it, and the second best has the suffix of an image before it. Otherwise the line is split at the first
    space.
    """
    if quoted := re.fullmatch(r'"([^"]+)"\s+(.+)', line):
        return quoted[1], quoted[2].strip('"')
    places = list(re.finditer(r"\s+", line))
    splits = [(line[: place.start()], line[place.end() :]) for place in places[:_MAX_SPLITS]]
    known = [split for split in splits if images.place(split[0]) is not None]
    for split in reversed(known):
        if split[1] in classes or re.fullmatch("[0-9]+", split[1]):
            return split
    for split in reversed(known):  # a label that is followed by boxes
        if split[1].split()[0] in classes or re.match(r"[0-9]+\s", split[1]):
            return split
    suffixed = [split for split in splits if has_image_suffix(split[0])]
    return next(iter([*reversed(suffixed), *reversed(known), *splits]), ("", ""))


def _places(path: Path, root: Path, rows: list[Row], names: Sequence[str], images: _Images) -> list[int]:
    """The index into `names` for each row. Every image must occur exactly once."""
    unknown_files = []
    lines: dict[int, int] = {}  # image -> line number
    for number, file, _ in rows:
        found = images.place(file)
        if found is None:
            unknown_files.append((number, file))
        elif found in lines:
            raise UserError(f"{path}: {file!r} is listed twice (lines {lines[found]} and {number}); remove one")
        else:
            lines[found] = number
    if unknown_files:
        number, file = unknown_files[0]
        remedy = "give both the same images"
        if number == 1:
            remedy += ", or, if line 1 is a header, remove it"
        elif " " in file or any(" " in name for name in names):
            remedy += " (names with spaces are safest in a CSV file: FILE,LABEL)"
        raise UserError(
            f"{path}: {len(unknown_files):,} of {len(rows):,} files are not in {root}, first {file!r} (line {number}); "
            f"{remedy}"
        )
    missing = sorted(name for place, name in enumerate(names) if place not in lines)
    if missing:
        raise UserError(
            f"{path}: no label for {len(missing):,} of the {len(names):,} images of {root}, first {missing[0]!r}; "
            "add them, or remove the images"
        )
    return list(lines)


def _numbers(path: Path, rows: list[Row], classes: Sequence[str], ids: dict[int, str] | None) -> list[int]:
    """The label of each row, an index into `classes`."""
    known = {name: label for label, name in enumerate(classes)}
    composed = {unicodedata.normalize("NFC", name): name for name in classes}  # macOS decomposes accents
    labels = [
        label if label in known else composed.get(unicodedata.normalize("NFC", label), label) for *_, label in rows
    ]
    # Kaggle's labels are followed by boxes, so an unknown label is cut at its first space.
    texts = [label if label in known else label.split()[0] for label in labels]
    if all(text in known for text in texts):
        return [known[text] for text in texts]
    not_integers = [index for index, text in enumerate(texts) if not re.fullmatch("[0-9]{1,9}", text)]
    if 2 * len(not_integers) >= len(texts):
        index = next(index for index, text in enumerate(texts) if text not in known)
        raise _unknown(f"{path}: line {rows[index][0]}", rows[index][2], classes)
    if not_integers:
        number, _, label = rows[not_integers[0]]
        raise UserError(f"{path}: line {number}: {shorten(label, 80)!r} is not an integer, unlike the other labels")
    values = [int(text) for text in texts]
    if ids is not None:
        return _from_ids(path, rows, values, known, ids)
    if min(values) > 0 and max(values) == len(classes):
        raise UserError(
            f"{path}: labels up to {max(values):,} and no 0: ILSVRC2012's IDs, which are not in the order of the class "
            "names; give the class of each ID with --synsets (the devkit's meta.mat or map_clsloc.txt)"
        )
    if max(values) >= len(classes):
        number, _, label = rows[values.index(max(values))]
        raise UserError(
            f"{path}: line {number}: label {label}, but train has {len(classes):,} classes; give class names, or "
            "places from 0 in their order, or ILSVRC2012's IDs with --synsets"
        )
    if min(values) > 0 and not rows[0][1]:
        raise UserError(
            f"{path}: labels from {min(values):,} to {max(values):,} for {len(classes):,} classes may count from 0 or "
            "from 1; give class names instead, or --synsets if they are ILSVRC2012's IDs"
        )
    return values


def _from_ids(path: Path, rows: list[Row], values: list[int], known: dict[str, int], ids: dict[int, str]) -> list[int]:
    labels = []
    for row, value in zip(rows, values, strict=True):
        if value not in ids:
            raise UserError(f"{path}: line {row[0]}: ID {value} is not among the {len(ids):,} that --synsets names")
        if ids[value] not in known:
            raise _unknown(f"{path}: line {row[0]}: ID {value}", ids[value], list(known))
        labels.append(known[ids[value]])
    return labels


def _unknown(where: str, name: str, classes: Sequence[str]) -> UserError:
    hint = shorten(nearest(name, classes), 120)
    return UserError(f"{where}: train has no class {shorten(name, 80)!r}; {hint}")
