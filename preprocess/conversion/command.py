"""The code that all conversions share: estimate of the disk space, parts, and the final summary."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from sdpnet.pipelines.errors import UserError, printable
from sdpnet.pipelines.shards.manifest import UNFINISHED_NAME
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet, training
from sdpnet.pipelines.terminal.remedy import rebuild
from sdpnet.preprocess.conversion.convert import Image, ImageSource, MakeWriter, convert
from sdpnet.preprocess.conversion.identity import Conversion
from sdpnet.preprocess.conversion.parts import Part, convert_part, merge
from sdpnet.preprocess.conversion.ray_parts import run_on_ray
from sdpnet.preprocess.conversion.summary import notes, print_line, summary
from sdpnet.preprocess.conversion.unfinished import refuse_existing
from sdpnet.preprocess.conversion.writers.tar import SHARD_BYTES
from sdpnet.preprocess.encoding import jpeg
from sdpnet.preprocess.encoding.encode import codec
from sdpnet.preprocess.encoding.settings import EncodeSettings
from sdpnet.preprocess.sources.listing import SplitImages
from sdpnet.preprocess.sources.parquet.row import ImageLocation
from sdpnet.preprocess.sources.scan import Scan, scan_arguments
from sdpnet.preprocess.workers.pool import Workers, number_of_workers
from sdpnet.preprocess.workers.result import Encoded

__all__ = ["build", "encoded_images", "plan_conversion"]

_PATH_FLAGS: Final = ("source", "train", "val", "val_labels", "synsets")
_SOURCE_FLAGS: Final = (*_PATH_FLAGS, "val_share", "val_seed", "image_column", "label_column")
_NUM_ESTIMATED: Final = 48  # the number of images that are encoded for the estimate of the disk space
_AMPLE_FACTOR: Final = 10  # no estimate is made if the disk has room for this many times the originals


def plan_conversion(found: Scan, source: str, settings: EncodeSettings) -> Conversion:
    """Returns the conversion of all splits of a scan. `source` is the name of the source in the manifest."""
    origin = found.origin
    return Conversion(
        source=source,
        classes=found.classes,
        encode=settings.to_dict(),
        created_by=codec(),
        num_images={name: split.num_images for name, split in found.splits.items()},
        fingerprints={name: split.fingerprint() for name, split in found.splits.items()},
        val_draw=None if origin.val_share is None else {"share": origin.val_share, "seed": origin.val_seed},
        origin=origin,
    )


def encoded_images(found: Scan, workers: Workers, part: Part | None = None) -> ImageSource:
    """Returns the source of the encoded images of a scan, or of one part of it."""
    part = part or Part(1, 1)

    def images(name: str, first: int) -> Generator[Image, None, None]:
        split = found.splits[name]
        start, end = part.image_range(split.num_images)
        with closing(workers.encode(split.locate, start + first, end)) as results:
            for index, result in enumerate(results, start + first):
                yield Image(int(split.labels[index]), result, partial(_names, split, index))

    return images


def _names(split: SplitImages, index: int) -> tuple[str, str]:
    return split.relative_path(index), split.locate(index).name


def build(arguments: argparse.Namespace, make_writer: MakeWriter, output: dict[str, Any]) -> int:
    """Runs the conversion given by the flags, prints the summary and returns the exit status, 0.

    `make_writer` and `output` are arguments of `convert`.
    """
    out = Path(arguments.out)
    start_time = time.monotonic()
    if arguments.merge:
        given = [flag for flag in _SOURCE_FLAGS if getattr(arguments, flag) is not None]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{flag} with --merge: the parts already have a source; omit {flag}")
        manifest = merge(make_writer, output, out)
    elif arguments.ray is not None:
        if arguments.ray < 1:
            raise UserError(f"--ray {arguments.ray}: must be at least 1")
        for flag in (*_PATH_FLAGS, "out"):  # Ray's tasks have another working directory
            if getattr(arguments, flag) is not None:
                setattr(arguments, flag, os.path.abspath(getattr(arguments, flag)))
        parts = [Part(number, arguments.ray) for number in range(1, arguments.ray + 1)]
        run_on_ray([partial(build_part, arguments, part) for part in parts], number_of_workers(arguments.workers))
        manifest = merge(make_writer, output, out)
    elif arguments.part is not None:
        part = Part.parse(arguments.part)
        count = build_part(arguments, part)
        print_line(f"{printable(out)}: part {part.number}/{part.count} is finished, {count:,} images")
        for line in next_lines(*_merge_command(output, out), when=f"when all {part.count} parts are finished"):
            print_line(line)
        return 0
    else:
        with _prepared(arguments, None) as (conversion, images):
            manifest = convert(conversion, images, make_writer, output, out, arguments.on_bad)
        if not jpeg.available():
            print_line(f"encoded with Pillow, since the native JPEG codec is not built; it is faster: {rebuild()}")
    print_line(summary(manifest, out, time.monotonic() - start_time))
    for line in next_lines(*(training(out) or sdpnet("describe", out))):
        print_line(line)
    return 0


def _merge_command(output: dict[str, Any], out: Path) -> tuple[str | Path, ...]:
    words = ["--format", "tar"] if output["format"] == "tar" else []
    if (shard_bytes := output.get("shard_bytes", SHARD_BYTES)) != SHARD_BYTES:
        words += ["--shard-mib", str(shard_bytes >> 20)]
    return sdpnet("convert", *words, "--merge", "--out", out)


def build_part(arguments: argparse.Namespace, part: Part) -> int:
    """Converts one part of the conversion given by the flags. Returns its number of images."""
    with _prepared(arguments, part) as (conversion, images):
        return convert_part(conversion, images, part, arguments.out, arguments.on_bad)


@contextmanager
def _prepared(arguments: argparse.Namespace, part: Part | None) -> Iterator[tuple[Conversion, ImageSource]]:
    """Checks the flags, lists the images and yields the conversion and its images."""
    out = Path(arguments.out)
    fresh = not (out / UNFINISHED_NAME).exists()
    if fresh:
        refuse_existing(out)  # before the scan, which takes minutes for millions of files
    num_workers = number_of_workers(arguments.workers)
    if not arguments.hang_seconds > 0:
        raise UserError(f"--hang-seconds {arguments.hang_seconds:g}: must be above 0")
    settings = EncodeSettings(
        max_side=arguments.max_side,
        quality=arguments.quality,
        subsampling=arguments.subsampling,
        reencode=arguments.reencode,
        exif=arguments.exif,
        max_pixels=arguments.max_pixels,
        max_file_mb=arguments.max_file_mb,
    )
    if settings.reencode != "always" and not jpeg.available():
        raise UserError(f"--reencode {settings.reencode}: the native JPEG codec is not built: {rebuild()}")
    with Workers(settings, num_workers, arguments.hang_seconds) as workers:  # they start while the images are listed
        found = scan_arguments(arguments)
        for line in notes(found, arguments.source):
            print_line(line)
        if fresh:
            require_space(found, workers, out, twice=part is not None)
        source = Path(arguments.source if arguments.source is not None else arguments.train).absolute().name
        yield plan_conversion(found, source, settings), encoded_images(found, workers, part)


def require_space(found: Scan, workers: Workers, out: Path, *, twice: bool) -> None:
    """Raises `UserError` if the disk is certainly too small for the shards.

    It is certainly too small if it has less room than the estimate minus three times its standard error. For the
    estimate, a few evenly spaced images are encoded. No estimate is made if the disk has room for the originals
    several times over.

    Args:
        found: the images.
        workers: the workers of the conversion.
        out: the folder of the shard set.
        twice: whether there will be room needed for both the parts and the merged shards.
    """
    total = sum(split.num_images for split in found.splits.values())
    factor = total * (2 if twice else 1)
    folder = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    sample = [
        split.locate(index * split.num_images // count)
        for split in found.splits.values()
        for count in [min(split.num_images, max(1, _NUM_ESTIMATED * split.num_images // total))]
        for index in range(count)
    ]
    originals = [_size(location) for location in sample]
    if _AMPLE_FACTOR * max(statistics.fmean(originals), 1 << 10) * factor < free:
        return
    with closing(workers.encode(sample.__getitem__, 0, len(sample))) as results:
        sizes = [len(result.data) for result in results if isinstance(result, Encoded)]
    if len(sizes) < 2:
        return
    mean, error = statistics.fmean(sizes), statistics.stdev(sizes) / len(sizes) ** 0.5
    if (mean - 3 * error) * factor > free:
        raise UserError(
            f"{out}: needs about {mean * factor / 1e9:,.1f} GB (estimated from {len(sizes)} of {total:,} images"
            f"{', parts and merged' if twice else ''}), but its disk has {free / 1e9:,.1f} GB free"
        )


def _size(location: ImageLocation) -> int:
    if location.size is not None:
        return location.size
    try:
        return os.path.getsize(location.path)
    except OSError:  # the conversion will report the reason
        return 0
