"""Repeats what the conversion did to an image's pixels before the crop, so that prediction does the same.

a file's bytes -> `decode_image`, upright or as stored -> the longer side reduced to `max_side` -> the crop
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdpnet.pipelines.errors import require
from sdpnet.pipelines.images.area import average, fit
from sdpnet.pipelines.images.file import decode_image

__all__ = ["Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """The settings of a conversion that change pixels beyond the loss of its JPEGs.

    Attributes:
        exif: "ignore" leaves the pixels as the file stores them, "apply" turns them upright.
        max_side: the longer side is reduced to this many pixels; 0 keeps every size.

    The defaults apply to shard sets and models that do not record these settings.
    """

    exif: str = "ignore"
    max_side: int = 0

    def __post_init__(self) -> None:
        require(self.exif in ("ignore", "apply"), "exif", self.exif, "ignore or apply")
        ok = type(self.max_side) is int and self.max_side >= 0
        require(ok, "max_side", self.max_side, "a number of pixels, or 0 to keep every size")

    @classmethod
    def of(cls, encode: Mapping[str, Any]) -> Preprocessing:
        """The settings of a shard set, from its manifest's `encode`. Missing keys get their defaults.

        Keys are missing if another program wrote the shards.
        """
        return cls(**{key: encode[key] for key in ("exif", "max_side") if key in encode})

    def pixels(self, data: bytes) -> np.ndarray:
        """The pixels of an image file as the conversion would store them: RGB, uint8 (height, width, 3).

        Raises `ImageFileError` for files that the conversion refuses.
        """
        image = decode_image(data, exif=self.exif)
        height, width = image.shape[:2]
        new_width, new_height = fit(width, height, self.max_side)
        return image if (new_width, new_height) == (width, height) else average(image, new_height, new_width)
