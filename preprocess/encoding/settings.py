"""How images are stored: the settings of a conversion, with their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.kinds import MAX_PIXELS
from sdpnet.preprocess.sources.files.location import MAX_FILE_MB

__all__ = ["EXIF_CHOICES", "HANG_SECONDS", "JPEG_MAX_SIDE", "REENCODE_CHOICES", "SUBSAMPLINGS", "EncodeSettings"]

HANG_SECONDS: Final = 8.0  # of processor time: an image of a small file that takes longer is bad
JPEG_MAX_SIDE: Final = 65_500  # libjpeg's JPEG_MAX_DIMENSION; a .beton file allows 65,535
SUBSAMPLINGS: Final = ("4:4:4", "4:2:2", "4:2:0")
REENCODE_CHOICES: Final = ("auto", "always", "never")
EXIF_CHOICES: Final = ("ignore", "apply")


@dataclass(frozen=True)
class EncodeSettings:
    """How images are stored.

    Attributes:
        max_side: the longer side is reduced to this many pixels; 0 keeps the size of every image. Images are never
            enlarged.
        quality: libjpeg's quality, 1 to 100.
        subsampling: the chroma subsampling, "4:4:4", "4:2:2" or "4:2:0".
        restart_rows: the number of MCU rows between restart markers; 0 writes none.
        reencode: "always" encodes every image anew. A JPEG within `max_side` is then re-encoded without rounding the
            pixels in between (`sdpnet.preprocess.encoding.jpeg.reencode`). "auto" keeps the DCT coefficients of a JPEG
            within `max_side` if every reader of shards can decode it (8 bits, greyscale or YCbCr, a common chroma
            sampling). "never" refuses images that cannot be kept. `quality` and `subsampling` do not apply to images
            that are kept.
        exif: "ignore" stores the pixels as they are in the file, without regard to its EXIF orientation. This is usual
            for ImageNet: torchvision's ImageFolder does so, and published accuracies are measured that way. "apply"
            turns images upright; those that must be turned are re-encoded.
        max_pixels: an image with more pixels is bad. The memory that a worker needs for decoding depends on the format:
            almost none for a baseline JPEG, 6 bytes a pixel for a progressive one, 4 for PNG, up to 16 for others.
        max_file_mb: a larger file, in units of 1,000,000 bytes, is bad and is not read.

    Raises:
        UserError: a value is out of range.
    """

    max_side: int = 500
    quality: int = 90
    subsampling: str = "4:2:0"
    restart_rows: int = 1
    reencode: str = "always"
    exif: str = "ignore"
    max_pixels: int = MAX_PIXELS
    max_file_mb: int = MAX_FILE_MB

    def __post_init__(self) -> None:
        if not 0 <= self.max_side <= JPEG_MAX_SIDE:
            raise UserError(f"max_side {self.max_side}: must be 1 to {JPEG_MAX_SIDE}, or 0 to keep every size")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality}: must be 1 to 100")
        if self.subsampling not in SUBSAMPLINGS:
            raise UserError(f"subsampling {self.subsampling!r}: must be one of {', '.join(SUBSAMPLINGS)}")
        if not 0 <= self.restart_rows <= 65_535:
            raise UserError(f"restart_rows {self.restart_rows}: must be 0 to 65535")
        if self.reencode not in REENCODE_CHOICES:
            raise UserError(f"reencode {self.reencode!r}: must be one of {', '.join(REENCODE_CHOICES)}")
        if self.exif not in EXIF_CHOICES:
            raise UserError(f"exif {self.exif!r}: must be one of {', '.join(EXIF_CHOICES)}")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise UserError(f"max_pixels {self.max_pixels}: must be 1 to {MAX_PIXELS}")
        if not 1 <= self.max_file_mb <= 1_000_000:
            raise UserError(f"max_file_mb {self.max_file_mb}: must be 1 to 1000000")

    def to_dict(self) -> dict[str, Any]:
        """The settings for JSON. Limits with their default values are omitted, as in older shard sets."""
        defaults = {"max_pixels": MAX_PIXELS, "max_file_mb": MAX_FILE_MB}
        return {key: value for key, value in vars(self).items() if defaults.get(key) != value}
