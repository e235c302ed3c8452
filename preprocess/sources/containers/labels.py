"""The labels of images in container files, and the classes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Final

import numpy as np

from sdpnet.pipelines.errors import UserError, nearest

__all__ = ["MAX_CLASSES", "ClassLabels", "checked_names"]

MAX_CLASSES: Final = 1_000_000
_MAX_NAME: Final = 1000  # characters of the name of a class


@dataclass(frozen=True, eq=False)
class ClassLabels:
    """The labels of the images of a split.

    Attributes:
        where: the files, for messages.
        values: int64 (num_images,), 0 to `MAX_CLASSES` - 1.
        names: the name of each value; None if the source has only integers.
    """

    where: str
    values: np.ndarray
    names: tuple[str, ...] | None

    def __post_init__(self) -> None:
        if self.names is not None and self._largest >= len(self.names):
            raise UserError(
                f"{self.where}: label {self._largest:,}, but the classes have {len(self.names):,} names; give all of "
                "them, in the order of the labels"
            )

    @property
    def _largest(self) -> int:
        return int(self.values.max(initial=-1))

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of a train split with these labels: their names, or "0", "1", ... up to the largest integer."""
        return self.names if self.names is not None else tuple(map(str, range(self._largest + 1)))

    def among(self, classes: Sequence[str]) -> np.ndarray:
        """The labels as indices into the classes of the train split: int32 (num_images,).

        Classes correspond by their names. Integers without names are indices already.

        Raises:
            UserError: the train split does not have one of the classes.
        """
        if self.names is None:
            if self._largest >= len(classes):
                raise UserError(
                    f"{self.where}: label {self._largest:,}, but train has {len(classes):,} classes; give both the "
                    "same classes"
                )
            return self.values.astype(np.int32)
        known = {name: label for label, name in enumerate(classes)}
        for value in np.unique(self.values).tolist():
            if self.names[value] not in known:
                name = self.names[value]
                hint = shorten(nearest(name, classes), 120)
                raise UserError(f"{self.where}: train has no class {shorten(name, 80)!r}; {hint}")
        return np.array([known.get(name, -1) for name in self.names], np.int32)[self.values]


def checked_names(names: Sequence[object], where: str | Path) -> tuple[str, ...]:
    """Returns the names of classes in label order. Raises `UserError` unless they are distinct texts of usable length.

    `where` is the place of the names, for messages.
    """
    if len(names) > MAX_CLASSES:
        raise UserError(f"{where}: {len(names):,} classes, more than {MAX_CLASSES:,}; name another column of labels")
    seen: dict[str, int] = {}
    for label, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or len(name) > _MAX_NAME:
            shown = shorten(repr(name), 60)
            raise UserError(f"{where}: the name of class {label} is {shown}, must be 1 to {_MAX_NAME:,} characters")
        if seen.setdefault(name, label) != label:
            raise UserError(
                f"{where}: {shorten(name, 60)!r} is the name of two classes ({seen[name]} and {label}); give each "
                "class a name of its own"
            )
    return tuple(seen)
