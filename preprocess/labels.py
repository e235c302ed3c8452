"""Reads the labels of validation images that are not in class folders.

Each line of the file says one of

    FILE LABEL  or  FILE,LABEL       suffix and folders of FILE do not matter; LOC_val_solution.csv is of this form
    LABEL                            of the image whose place by name is the line's number

and LABEL is a class name, a place from 0 in the sorted class names (Caffe's val.txt), or an ILSVRC2012 ID from 1
(ILSVRC2012_validation_ground_truth.txt, which the packed development kit also holds).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np

from pipelines.errors import UserError, nearest
from preprocess.listing import IMAGE_SUFFIXES
from preprocess.synsets import is_devkit, read_devkit, read_synsets, read_text

__all__ = ["read_labels"]

Row = tuple[int, str, str]  # line number, file ("" where the line's number says which), label


def read_labels(
    path: Path, root: Path, names: Sequence[str], classes: Sequence[str], synsets: Path | None = None
) -> np.ndarray:
    """The images' labels, int32 (len(names),), indices into `classes`.

    Integers are class names where all of them are; else IDs where `synsets` is given; else places from 0, unless they
    may be IDs: the largest is `len(classes)`, or there are no files beside them and no 0 among them.

    Args:
        path: the labels, or the packed development kit.
        root: the images' folder or archive, for messages.
        names: the images' file names, each once.
        classes: class names in label order.
        synsets: which class each ID is; see `preprocess.synsets.read_synsets`.

    Raises:
        UserError: naming the file and, where it is one line's fault, the line: for a file that cannot be read, an
            unknown class, integers that could mean two things, images without a label or with two, and labels
            without an image.
    """
    ids: dict[int, str] | None = None
    if is_devkit(path):
        text, ids = read_devkit(path)
    else:
        text = read_text(path)
        ids = None if synsets is None else read_synsets(synsets)
    rows = _rows(path, text, set(classes))
    if rows[0][1]:
        rows, places = _places(path, root, rows, names, set(classes))
    else:
        if len(rows) != len(names):
            raise UserError(f"{path}: {len(rows):,} labels, but {root} has {len(names):,} images; each needs one")
        places = sorted(range(len(names)), key=names.__getitem__)
    labels = np.empty(len(names), np.int32)
    labels[places] = _numbers(path, rows, classes, ids)
    return labels


def _rows(path: Path, text: str, classes: set[str]) -> list[Row]:
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if "" in lines:
        raise UserError(f"{path}: line {lines.index('') + 1} is empty; remove it, or write what is missing")
    num_classes = sum(line in classes for line in lines)
    if 2 * num_classes > len(lines) or (len(lines[0].split()) == 1 and "," not in lines[0]):
        return [(number, "", line) for number, line in enumerate(lines, 1)]
    rows = []
    is_csv = "," in lines[0]
    for number, line in enumerate(lines, 1):
        try:
            fields = next(csv.reader([line])) if is_csv else line.split(maxsplit=1)
        except csv.Error:  # a field of over 131,072 characters
            fields = []
        if len(fields) != 2 or not all(field.strip() for field in fields):
            form = "FILE,LABEL" if is_csv else "FILE LABEL"
            raise UserError(f"{path}: line {number} is {shorten(line, 80)!r}, must be {form}")
        rows.append((number, fields[0].strip(), fields[1].strip()))
    return rows


def _places(
    path: Path, root: Path, rows: list[Row], names: Sequence[str], classes: set[str]
) -> tuple[list[Row], list[int]]:
    """The rows without a header line, and which of `names` each one is about: all of them, each once."""
    by_name = {name: place for place, name in enumerate(names)}
    by_stem: dict[str, int | None] = {}
    for name, place in by_name.items():
        stem = os.path.splitext(name)[0]
        by_stem[stem] = None if stem in by_stem else place  # None: two images differ in the suffix alone

    def place_of(file: str) -> int | None:
        name = file.rsplit("/", 1)[-1]
        stem, suffix = os.path.splitext(name)
        if name in by_name:
            return by_name[name]
        return by_stem.get(name) if suffix.lower() not in IMAGE_SUFFIXES else by_stem.get(stem)

    _, file, label = rows[0]
    if place_of(file) is None and not {label, label.split()[0]} & classes and not re.fullmatch("[0-9]+", label):
        rows = rows[1:]
    strangers = []
    lines: dict[int, int] = {}  # of each image
    for number, file, _ in rows:
        found = place_of(file)
        if found is None:
            strangers.append((number, file))
        elif found in lines:
            raise UserError(f"{path}: {file!r} is listed twice (lines {lines[found]} and {number}); remove one")
        else:
            lines[found] = number
    if strangers:
        number, file = strangers[0]
        raise UserError(
            f"{path}: {len(strangers):,} of {len(rows):,} files are not in {root}, first {file!r} (line {number}); "
            "give both the same images"
        )
    missing = sorted(name for place, name in enumerate(names) if place not in lines)
    if missing:
        raise UserError(
            f"{path}: no label for {len(missing):,} of the {len(names):,} images of {root}, first {missing[0]!r}; "
            "add them, or remove the images"
        )
    return rows, list(lines)


def _numbers(path: Path, rows: list[Row], classes: Sequence[str], ids: dict[int, str] | None) -> list[int]:
    """The label of each row."""
    known = {name: label for label, name in enumerate(classes)}
    texts = [label if label in known else label.split()[0] for _, _, label in rows]  # Kaggle: name and box, repeated
    if all(text in known for text in texts):
        return [known[text] for text in texts]
    not_integers = [index for index, text in enumerate(texts) if not re.fullmatch("[0-9]{1,9}", text)]
    if 2 * len(not_integers) >= len(texts):
        index = next(index for index, text in enumerate(texts) if text not in known)
        raise _unknown(f"{path}: line {rows[index][0]}", rows[index][2], classes)
    if not_integers:
        number, _, label = rows[not_integers[0]]
        raise UserError(f"{path}: line {number}: {shorten(label, 80)!r} is no integer, as the other labels are")
    values = [int(text) for text in texts]
    if ids is not None:
        return _from_ids(path, rows, values, known, ids)
    if min(values) > 0 and max(values) == len(classes):
        raise UserError(
            f"{path}: labels up to {max(values):,} and no 0: ILSVRC2012's IDs, which are not in the order of the class "
            "names; say with --synsets which class each is (the devkit's meta.mat or map_clsloc.txt)"
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
