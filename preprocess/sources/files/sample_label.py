"""Reads the label of a WebDataset sample from the files beside its image.

KEY.cls     an integer
KEY.json    an integer or a class name in "label" or another usual field; perhaps also the name of an integer
KEY.txt     the label if the text is an integer, otherwise a caption
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten
from typing import Any, Final, NamedTuple

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.files.tar_members import Member, TarMembers

__all__ = ["LABEL_SUFFIXES", "MAX_CLASSES", "Label", "LabelReader"]

MAX_CLASSES: Final = 1_000_000  # integers that are labels must be smaller
LABEL_SUFFIXES: Final = (".cls", ".json", ".txt")  # the first one that a sample has is its label
_MAX_NUMBER: Final = 64  # bytes of a file with an integer
_MAX_JSON: Final = 1 << 20  # bytes
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")
_LABEL_FIELDS: Final = ("label", "cls", "class_index", "class_idx", "class_id", "class", "target")
_NAME_FIELDS: Final = ("class_name", "classname", "label_name", "class_label", "wnid", "synset", "class_id", "class")


class Label(NamedTuple):
    """The label of a sample, the suffix of its file, and the name of the class if it is an integer."""

    label: int | str
    suffix: str
    class_name: str | None


class LabelReader:
    """Reads the labels of the samples of a WebDataset tar.

    Args:
        path: the tar.
        members: its members.
        named: the integers for which no class name is looked for. Labels are added to it. None looks for no names.
    """

    def __init__(self, path: Path, members: TarMembers, named: set[int] | None) -> None:
        self._path, self._members, self._named = path, members, named

    def label(self, labels: dict[str, Member]) -> Label | None:
        """The label of a sample.

        Args:
            labels: its files with a suffix of `LABEL_SUFFIXES`.

        Returns:
            None if the sample has no label.

        Raises:
            UserError: the label is neither an integer from 0 to `MAX_CLASSES` - 1 nor the name of a class.
        """
        for suffix in LABEL_SUFFIXES:
            member = labels.get(suffix)
            if member is None:
                continue
            if suffix == ".json":
                fields = self._fields(member)
                label = next((fields[name] for name in _LABEL_FIELDS if _is_label(fields.get(name))), None)
                label = label if label is not None else _first_text(fields, _NAME_FIELDS)
                if label is None:
                    found = shorten(", ".join(map(repr, fields)), 120)
                    raise UserError(
                        f"{self._path}: {member.name}: none of the fields {found} is a usual name of labels; write the "
                        'label into KEY.cls, or into KEY.json as "label"'
                    )
                if isinstance(label, str) and not _INTEGER.fullmatch(label):
                    return Label(label, suffix, None)
                return Label(self._in_range(int(label), member), suffix, self._class_name(int(label), fields))
            text = self._members.read(member, _MAX_NUMBER + 1).strip().decode("utf-8", "replace")
            if member.size <= _MAX_NUMBER and _INTEGER.fullmatch(text):
                label = self._in_range(int(text), member)
                return Label(label, suffix, self._class_name_beside(label, labels.get(".json")))
            if suffix == ".cls":
                raise UserError(
                    f"{self._path}: {member.name}: {text!r:.60} is not an integer; write integers into the "
                    '.cls files, or the names of the classes into KEY.json as "label"'
                )
        return None

    def _in_range(self, label: int, member: Member) -> int:
        if 0 <= label < MAX_CLASSES:
            return label
        remedy = (
            "images without a label, as in a test split, cannot be used" if label == -1 else "number the classes from 0"
        )
        raise UserError(f"{self._path}: {member.name}: label {label!s:.40}, must be 0 to {MAX_CLASSES - 1:,}; {remedy}")

    def _class_name_beside(self, label: int, member: Member | None) -> str | None:
        """The class name that the JSON file beside a `.cls` file has. The file need not be JSON, as it has no label."""
        if self._named is None or label in self._named or member is None:
            return None
        try:
            return self._class_name(label, self._fields(member))
        except UserError:
            return None

    def _class_name(self, label: int, fields: dict[str, Any]) -> str | None:
        if self._named is None or label in self._named:
            return None
        self._named.add(label)
        return _first_text(fields, _NAME_FIELDS)

    def _fields(self, member: Member) -> dict[str, Any]:
        """The fields of a JSON file."""
        where = f"{self._path}: {member.name}"
        if member.size > _MAX_JSON:
            raise UserError(f"{where}: {member.size:,} bytes of JSON; make the tar again with smaller label files")
        try:
            fields = json.loads(self._members.read(member, _MAX_JSON))
        except (ValueError, RecursionError) as error:
            reason = shorten(str(error), 80) or type(error).__name__
            raise UserError(f"{where}: no JSON ({reason}); make the tar again, or remove this sample") from None
        if not isinstance(fields, dict):
            raise UserError(f'{where}: must be a JSON object with the field "label"')
        return fields


def _is_label(value: object) -> bool:
    return type(value) is int or (isinstance(value, str) and bool(value.strip()) and _is_text(value))


def _is_text(value: str) -> bool:
    """Whether a text from JSON can be written to a manifest: it has no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_text(fields: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of these fields that is a text, but no number."""
    values = (fields.get(name) for name in names)
    return next(
        (
            value
            for value in values
            if isinstance(value, str) and value.strip() and not value.isdigit() and _is_text(value)
        ),
        None,
    )
