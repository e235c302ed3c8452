"""Command: checks a shard set from end to end and names what is damaged: python preprocess/verify.py SHARDS [--decode]

Structure and labels of every file, then its SHA-256 against the manifest's; where that differs, the CRC-32 of each
sample says which images have changed. `--decode` also decodes every image. `--quick` stops after the structure. Exit
status 0 when nothing is wrong, 1 when something is.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: import from the checkout, and nothing by its bare name from this folder
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]

import numpy as np

from pipelines.beton_reader import CRC32_DTYPE, MODE_RAW
from pipelines.errors import ShardError, run_command
from pipelines.layout import QUARANTINE_NAME, Manifest, ShardFile, ShardReader, open_file, read_manifest
from pipelines.strict_jpeg import DamagedJpegError, decode_jpeg
from pipelines.tar_reader import SAMPLE_DTYPE
from preprocess.beton import sha256_of

__all__ = ["Problem", "main", "verify"]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written. `sample` is None where it concerns no single image."""

    file: str
    sample: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" if self.sample is None else f"{self.file}: sample {self.sample}: {self.what}"


def verify(
    directory: str | os.PathLike[str], *, quick: bool = False, decode: bool = False, num_workers: int = 1
) -> Iterator[Problem]:
    """Yields every problem of a shard set as it is found; nothing when all is well.

    Args:
        directory: the shard set.
        quick: only the structure: manifest, headers, tables and labels, no image is read.
        decode: decode every image too (which finds what was damaged before it was written).
        num_workers: threads that decode.

    Raises:
        ShardError: there is no manifest, or it cannot be read.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for split in manifest.splits.values():
        for file in split.files:
            try:
                reader = open_file(directory, manifest, file)
            except ShardError as error:
                what = str(error).removeprefix(f"{directory / file.name}: ").removeprefix(f"{directory}{os.sep}")
                yield Problem(file.name, None, what)
                continue
            if not quick:
                yield from _contents(directory, file, reader)
            if decode:
                yield from _undecodable(file, reader, num_workers)
    if manifest.quarantine_sha256 is not None and not quick:
        yield from _changed(directory, QUARANTINE_NAME, manifest.quarantine_sha256)


def _changed(directory: Path, name: str, sha256: str) -> Iterator[Problem]:
    """The problem of a file that is to be read as a whole, if it has one."""
    try:
        if sha256_of(directory / name) != sha256:
            yield Problem(name, None, "has changed (SHA-256); copy it again")
    except OSError as error:
        yield Problem(name, None, f"cannot be read ({error.strerror}); copy it again")


def _contents(directory: Path, file: ShardFile, reader: ShardReader) -> Iterator[Problem]:
    damaged = set()
    for name, sha256 in file.sidecars.items():
        for problem in _changed(directory, name, sha256):
            damaged.add(name)
            yield problem
    if sha256_of(directory / file.name) == file.sha256:
        return
    path = directory / file.name
    table = path.with_suffix(".crc32" if path.suffix == ".beton" else ".samples")
    if table.name in damaged:
        yield Problem(file.name, None, "its contents have changed (SHA-256); copy it again")
        return
    checksums = (
        np.fromfile(table, CRC32_DTYPE) if path.suffix == ".beton" else np.fromfile(table, SAMPLE_DTYPE)["crc32"]
    )
    changed = [i for i in range(reader.num_samples) if zlib.crc32(reader.encoded(i).data) != checksums[i]]
    for sample in changed:
        yield Problem(file.name, sample, "its image has changed (CRC-32); copy the file again")
    if not changed:
        yield Problem(
            file.name, None, "has changed outside of the images: header, labels, tables or padding; copy it again"
        )


def _undecodable(file: ShardFile, reader: ShardReader, num_workers: int) -> Iterator[Problem]:
    def check(sample: int) -> Problem | None:
        height, width = reader.sizes[sample].tolist()
        try:
            decode_jpeg(reader.encoded(sample), height, width)
        except DamagedJpegError as error:
            return Problem(file.name, sample, f"cannot be decoded ({error})")
        return None

    jpegs = np.flatnonzero(reader.modes != MODE_RAW).tolist()
    with ThreadPoolExecutor(num_workers) as pool:
        for start in range(0, len(jpegs), 4096):  # bounded: as many futures as a piece has images
            yield from (problem for problem in pool.map(check, jpegs[start : start + 4096]) if problem is not None)


def _summary(manifest: Manifest, checked: str) -> str:
    samples = sum(split.num_samples for split in manifest.splits.values())
    size = sum(file.bytes for split in manifest.splits.values() for file in split.files)
    return f"{samples:,} samples in {', '.join(sorted(manifest.splits))}, {size:,} bytes: {checked}"


def _main(arguments: argparse.Namespace) -> int:
    found = 0
    options = {"quick": arguments.quick, "decode": arguments.decode}
    for problem in verify(arguments.shards, **options, num_workers=arguments.workers):
        found += 1
        print(problem, file=sys.stderr)
    what = "structure" if arguments.quick else "structure and checksums"
    what += " and every image's decoding" if arguments.decode else ""
    manifest = read_manifest(arguments.shards)
    print(_summary(manifest, f"{found:,} problems" if found else f"{what} are in order"))
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="verify", description="Checks a shard set from end to end.")
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="directory with a manifest.json")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="only the structure: no image is read")
    depth.add_argument("--decode", action="store_true", help="decode every image too")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads that decode")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: must be at least 1")
    return run_command(lambda: _main(arguments))


if __name__ == "__main__":
    sys.exit(main())
