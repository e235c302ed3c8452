"""The flags that all conversions share, into any format."""

from __future__ import annotations

import argparse

from sdpnet.pipelines.terminal.quiet import add_quiet
from sdpnet.preprocess.encoding.settings import (
    EXIF_CHOICES,
    HANG_SECONDS,
    REENCODE_CHOICES,
    SUBSAMPLINGS,
    EncodeSettings,
)
from sdpnet.preprocess.flags.sources import add_source_arguments

__all__ = ["add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that do not depend on the format of the shards."""
    defaults = EncodeSettings()
    add = parser.add_argument
    add("--out", metavar="DIR", required=True, help="folder of the shard set")
    add_source_arguments(parser)
    side = "reduce the longer side to this many pixels; 0 keeps every size (default: %(default)s)"
    add("--max-side", metavar="N", type=int, default=defaults.max_side, help=side)
    quality = "quality of the JPEGs, 1 to 100 (default: %(default)s)"
    add("--quality", metavar="N", type=int, default=defaults.quality, help=quality)
    subsampling = "chroma subsampling of the JPEGs; 4:4:4 keeps small images sharp (default: %(default)s)"
    add("--subsampling", choices=SUBSAMPLINGS, default=defaults.subsampling, help=subsampling)
    reencode = (
        "always: encode every image anew; auto: keep JPEGs that are within --max-side without loss; never: an image "
        "that cannot be kept is bad (default: %(default)s)"
    )
    add("--reencode", choices=REENCODE_CHOICES, default=defaults.reencode, help=reencode)
    exif = "EXIF orientation; training on ImageNet usually ignores it (default: %(default)s)"
    add("--exif", choices=EXIF_CHOICES, default=defaults.exif, help=exif)
    pixels = (
        "an image with more pixels is bad; this limits the memory of a worker, which takes up to 16 bytes a pixel "
        "(default: %(default)s)"
    )
    add("--max-pixels", metavar="N", type=int, default=defaults.max_pixels, help=pixels)
    file_mb = "a larger file, in MB, is bad and is not read (default: %(default)s)"
    add("--max-file-mb", metavar="N", type=int, default=defaults.max_file_mb, help=file_mb)
    on_bad = "an image that cannot be converted ends the conversion, or is skipped and listed (default: %(default)s)"
    add("--on-bad", choices=["fail", "skip"], default="fail", help=on_bad)
    add("--workers", metavar="N", type=int, help="number of processes that encode (default: one for each CPU core)")
    hang = "an image that takes more processor time than this and 1 s for each MB is bad (default: %(default)s)"
    add("--hang-seconds", metavar="S", type=float, default=HANG_SECONDS, help=hang)
    many = parser.add_mutually_exclusive_group()
    add = many.add_argument
    part = "convert only part I of N; the parts may run at the same time, on machines that share --out"
    add("--part", metavar="I/N", help=part)
    add("--merge", action="store_true", help="make the shard set from the parts in --out")
    add("--ray", metavar="N", type=int, help="convert N parts on a Ray cluster that shares all paths, then merge them")
    add_quiet(parser)
