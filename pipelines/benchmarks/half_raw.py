"""Writes a copy of a shard set as FFCV's own ImageNet recipe stores it: half of the images are raw pixels.

    python -m sdpnet.pipelines.benchmarks.half_raw --data SHARDS

FFCV's published ImageNet results use files named 500_0.50_90: sides of at most 500 pixels, half of the images raw, the
others as JPEG of quality 90. Raw images need no decoding, so that this setting is faster than JPEG alone, and several
times as large. `sdpnet bench --pipelines ffcv_raw` reads the copy, which FFCV's own writer makes: SHARDS-half-raw,
beside the shard set. Images keep their sizes, so that the crops are those of the other contestants.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.images.strict_jpeg import decode_jpeg
from sdpnet.pipelines.machine import usable_cores
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.pipelines.shards.layout import ShardReader, open_split, sha256_of
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME, Manifest, ShardFile, Split
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["add_arguments", "main", "run"]

RAW_SHARE: Final = 0.5
QUALITY: Final = 90


class _Pixels:
    """The samples of a split for FFCV's writer: (uint8 (H, W, 3), label)."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return self._reader.num_samples

    def __getitem__(self, sample: int) -> tuple[np.ndarray, int]:
        encoded, (height, width) = self._reader.encoded(sample), self._reader.sizes[sample].tolist()
        if self._reader.modes[sample] == MODE_RAW:
            return encoded.reshape(height, width, 3), int(self._reader.labels[sample])
        return decode_jpeg(encoded, height, width), int(self._reader.labels[sample])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="SHARDS", help="shard set")
    parser.add_argument("--split", default="train", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    """Writes the copy and prints what it costs."""
    manifest, reader = open_split(arguments.data, arguments.split)
    out = arguments.data.with_name(f"{arguments.data.name}-half-raw")
    if out.exists():
        raise UserError(f"{out}: exists already; remove it to write it again")
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    path, began = unfinished / f"{arguments.split}.beton", time.perf_counter()
    multiprocessing.set_start_method("fork", force=True)  # FFCV's workers are not made for Python 3.14's default
    image = RGBImageField(write_mode="proportion", compress_probability=1 - RAW_SHARE, jpeg_quality=QUALITY)
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=len(usable_cores()))
    writer.from_indexed_dataset(_Pixels(reader))
    seconds, size = time.perf_counter() - began, path.stat().st_size
    file = ShardFile(path.name, reader.num_samples, size, sha256_of(path))
    splits = {arguments.split: Split(reader.num_samples, "beton", (file,))}
    copy = Manifest(manifest.source, manifest.classes, manifest.encode, splits, "ffcv's DatasetWriter")
    publish_bytes(unfinished / MANIFEST_NAME, copy.to_json().encode())
    os.rename(unfinished, out)
    before = int(reader.nbytes.sum())
    raw = int((open_split(out, arguments.split)[1].modes == MODE_RAW).sum())
    print(
        f"{out}: {raw:,} of {reader.num_samples:,} images are raw; {size / 1e6:,.0f} MB, "
        f"{size / before:.1f} times the encoded images; written in {seconds:,.0f} s"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_alone("half_raw", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
