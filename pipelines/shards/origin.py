"""The origin of a shard set: which part of the source became which split, and which files are in no split."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

__all__ = ["LeftOut", "Origin", "count_of", "text_of"]


def text_of(value: object) -> str:
    """Returns a text from JSON. Raises `TypeError` for other values."""
    if not isinstance(value, str):
        raise TypeError(f"{reprlib.repr(value)} where a text should be")
    return value


def count_of(value: object, limit: int = 1 << 63) -> int:
    """Returns a count from JSON: a whole number from 0 to `limit` - 1. Raises `ValueError` for other values."""
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f"{reprlib.repr(value)} where a count should be")
    return value


@dataclass(frozen=True)
class LeftOut:
    """Files of one kind in the source that are in no split.

    Attributes:
        kind: the kind in the plural, such as ".txt files".
        count: the number of files.
        example: the path of the first one, relative to the source.
    """

    kind: str
    count: int
    example: str

    def __str__(self) -> str:
        example = f"such as {self.example}" if self.count > 1 else self.example
        return f"{self.kind}: {self.count:,}{f', {example}' if self.count else ''}"


@dataclass(frozen=True)
class Origin:
    """How the files of a source became splits.

    Attributes:
        places: the folder (ending in "/") or archive of each split's images, relative to the source.
        left_out: all other files of the source, by kind.
        val_share: the share of the train images that was drawn as the val split; None if val has a place of its own.
        val_seed: the seed of that draw.
    """

    places: dict[str, str]
    left_out: tuple[LeftOut, ...] = ()
    val_share: float | None = None
    val_seed: int = 0

    @property
    def num_left_out(self) -> int:
        """The number of files that are in no split."""
        return sum(entry.count for entry in self.left_out)

    def place(self, split: str) -> str:
        """The origin of a split, as part of a sentence."""
        if split == "val" and self.val_share is not None:
            return f"drawn from train (share {self.val_share:g}, seed {self.val_seed})"
        return f"from {self.places.get(split, 'an unnamed place')}"

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; `from_dict` reads them back."""
        return {**vars(self), "left_out": [vars(entry) for entry in self.left_out]}

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Origin:
        """Makes an origin from the values of `to_dict`.

        Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for other values.
        """
        share = raw["val_share"]
        if share is not None and not (isinstance(share, float) and 0 < share < 1):
            raise ValueError(f"val_share {reprlib.repr(share)} is not a share between 0 and 1")
        return Origin(
            places={split: text_of(place) for split, place in raw["places"].items()},
            left_out=tuple(
                LeftOut(text_of(entry["kind"]), count_of(entry["count"]), text_of(entry["example"]))
                for entry in raw["left_out"]
            ),
            val_share=share,
            val_seed=count_of(raw["val_seed"], 1 << 64),
        )
