"""Chooses the columns of a Parquet file that have the images and the labels.

They are known from the features that Hugging Face's `datasets` writes into the metadata of the schema, or from their
types and usual names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Final

from sdpnet.pipelines.errors import UserError, nearest

__all__ = ["Columns", "choose_columns"]

IMAGE_NAMES: Final = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "picture", "pixel_values")
LABEL_NAMES: Final = ("label", "labels", "cls", "class", "fine_label", "target", "class_id", "class_name", "category")
_FEATURES_KEY: Final = b"huggingface"
_MAX_METADATA: Final = 1 << 26  # bytes; the names of a million classes take less


@dataclass(frozen=True)
class Columns:
    """The columns of a file.

    Attributes:
        image: the column of the images.
        is_struct: whether it is a struct with the field `bytes`.
        label: the column of the labels.
        is_text: whether the labels are texts.
        names: the names of the classes; None if the file has none.
    """

    image: str
    is_struct: bool
    label: str
    is_text: bool
    names: tuple[object, ...] | None

    @property
    def image_bytes(self) -> str:
        """The path of the column of bytes."""
        return f"{self.image}.bytes" if self.is_struct else self.image


def choose_columns(schema: Any, path: str, image: str | None, label: str | None) -> Columns:
    """Chooses the columns of a file.

    Args:
        schema: the schema of pyarrow.
        path: the file, for messages.
        image, label: the columns that the user named; None to find them.

    Raises:
        UserError: a column does not exist or has another type, or several columns may be meant.
    """
    names = list(schema.names)
    twice = next((name for name in names if names.count(name) > 1), None) if len(names) < 10_000 else None
    if twice is not None or not names:
        raise UserError(f"{path}: {f'two columns {twice!r}' if names else 'no columns'}; write the file again")
    features = _features(schema)
    by_type = {name: _image_kind(schema.field(name).type) for name in names}
    images = [name for name in names if by_type[name]]
    marked = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    chosen = _choose(path, "image", image, names, images, marked, IMAGE_NAMES)
    texts = {name for name in names if _is_text(schema.field(name).type)}
    labels = [name for name in names if name in texts or _is_integer(schema.field(name).type)]
    labels = [name for name in labels if not name.startswith("__index_level_")]  # written by pandas
    marked = [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"]
    chosen_label = _choose(path, "label", label, names, labels, marked, LABEL_NAMES)
    class_names = features.get(chosen_label, {}).get("names")
    is_text = chosen_label in texts
    known = tuple(class_names) if isinstance(class_names, list) and not is_text else None
    return Columns(chosen, by_type[chosen] == "struct", chosen_label, is_text, known)


def _choose(
    path: str,
    what: str,
    given: str | None,
    names: Sequence[str],
    by_type: Sequence[str],
    marked: Sequence[str],
    usual: Sequence[str],
) -> str:
    """The column that is `given`, or the only one that is marked, has a usual name or has the right type."""
    flag = f"--{what}-column"
    if given is not None:
        if given in by_type:
            return given
        if given in names:
            raise UserError(f"{path}: {flag} {given}: has no {'bytes' if what == 'image' else 'integers or texts'}")
        raise UserError(f"{path}: {flag} {given}: no such column; {shorten(nearest(given, names), 200)}")
    lowered = [name for name in by_type if name.lower() in usual]
    for candidates in (marked, [name for name in marked if name.lower() in usual], lowered, by_type):
        if len(candidates) == 1:
            return candidates[0]
    found = shorten(", ".join(map(repr, names)), 160)
    if not by_type:
        needs = "bytes of images (binary, or a struct with bytes)" if what == "image" else "labels (integers or texts)"
        raise UserError(f"{path}: no column with {needs}, but {found}; name a file that has them")
    several = shorten(", ".join(map(repr, lowered or by_type)), 160)
    raise UserError(f"{path}: the {what}s may be in several columns: {several}; choose one with {flag}")


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features of `datasets` by column; empty if there are none or if they are damaged."""
    raw = (schema.metadata or {}).get(_FEATURES_KEY, b"")
    try:
        features = json.loads(raw)["info"]["features"] if 0 < len(raw) <= _MAX_METADATA else {}
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _image_kind(type: Any) -> str:
    """ "struct" or "binary" for a type that images may have, otherwise ""."""
    from pyarrow import types

    if types.is_struct(type):
        index = type.get_field_index("bytes")
        return "struct" if index >= 0 and _is_binary(type.field(index).type) else ""
    return "binary" if _is_binary(type) else ""


def _is_binary(type: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(type) or types.is_large_binary(type))


def _is_integer(type: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(type))


def _is_text(type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(type):
        type = type.value_type
    return bool(types.is_string(type) or types.is_large_string(type))
