"""Draws a val split from the train images of a data set that has none.

In each class, the images are ordered by a hash of the seed and their name, and the first ones are drawn. The draw thus
depends neither on the order of the listing nor on other classes, and one image more or less changes it by at most one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.listing import SplitImages

__all__ = ["ValDraw", "draw_val"]


@dataclass(frozen=True)
class ValDraw:
    """The parameters of the draw.

    Attributes:
        share: the share of the train images that becomes the val split, above 0 and below 1.
        seed: the seed of the draw, 0 to 2^64 - 1.

    Raises:
        UserError: a value is out of range.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"--val-share {self.share:g}: must be above 0 and below 1, such as 0.05")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--val-seed {self.seed}: must be 0 to 2^64 - 1")


def draw_val(train: SplitImages, draw: ValDraw) -> tuple[SplitImages, SplitImages]:
    """Returns the images that stay in train and those that become val, which are the same share of each class.

    If the share of a class is not a whole number of images, it is rounded down or up at random, so that it is correct
    on average. At least one image of each class stays in train.

    Raises:
        UserError: no image is drawn.
    """
    key = draw.seed.to_bytes(8, "little")
    share = Fraction(repr(draw.share))
    drawn = np.zeros(train.num_images, bool)
    order = np.argsort(train.labels, kind="stable")  # container files need not be sorted by class
    starts = np.flatnonzero(np.diff(train.labels[order], prepend=-1)).tolist()
    for start, end in pairwise([*starts, train.num_images]):
        class_name = train.classes[train.labels[order[start]]]
        chance = Fraction(_hash(key, class_name, b"class"), 1 << 64)
        count = min(int((end - start) * share + chance), end - start - 1)
        if count > 0:
            by_hash = sorted(
                (_hash(key, train.relative_path(index), b"image"), index) for index in order[start:end].tolist()
            )
            drawn[[index for _, index in by_hash[:count]]] = True
    if not drawn.any():
        raise UserError(f"--val-share {draw.share:g}: draws none of {train.num_images:,} images; give a larger share")
    return train.select(np.flatnonzero(~drawn), train.left_out), train.select(np.flatnonzero(drawn))


def _hash(key: bytes, name: str, purpose: bytes) -> int:
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=8, key=key, person=purpose).digest(), "little")
