"""Command: checks a whole shard set and names what is damaged: `sdpnet verify SHARDS [--decode]`

It checks the structure and the labels of every file and the list of bad images, and compares each SHA-256 with that in
the manifest. If the SHA-256 of a file of images differs, the CRC-32 of each sample shows which ones have changed.
`--decode` also decodes every image. `--quick` checks only the structure. The exit status is 0 if there is no problem
and 1 otherwise.

Of images that lie elsewhere, each file must have the size and the modification time of the index. Their contents are
compared with the CRC-32 of each image if the index has them (`adopt --checksums`); otherwise every image is decoded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

if not __package__:  # run as a file: import sdpnet from the checkout, and no module of this folder by its bare name
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    from sdpnet import preprocess  # noqa: F401 - from here on, Ctrl-C ends the command with one line

import numpy as np
from zlib_ng import zlib_ng

from sdpnet.pipelines.errors import ShardError, printable
from sdpnet.pipelines.lasting_output import print_note
from sdpnet.pipelines.shards.beton import CRC32_DTYPE
from sdpnet.pipelines.shards.file import MappedFile, read_whole, size_of
from sdpnet.pipelines.shards.index_file import has_checksums
from sdpnet.pipelines.shards.layout import ShardReader, open_file, sha256_of
from sdpnet.pipelines.shards.manifest import QUARANTINE_NAME, UNFINISHED_NAME, Manifest, ShardFile, read_manifest
from sdpnet.pipelines.shards.tar import SAMPLE_DTYPE
from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet, training
from sdpnet.preprocess.flags.verify import add_arguments
from sdpnet.preprocess.inspection.in_place import problems_in_place
from sdpnet.preprocess.inspection.survey import quarantine_limit, read_quarantine
from sdpnet.preprocess.inspection.undecodable import undecodable

__all__ = ["Problem", "add_arguments", "main", "run", "verify"]

# The files beside a file of a split: checksums of the images (.crc32, .samples), the index for DALI (.idx), and the
# images that were converted although the others stay where they are (.converted).
SIDECARS: Final = {".beton": (".crc32",), ".tar": (".idx", ".samples"), ".index": (".converted",)}
CHANGED: Final = "has changed (SHA-256)"
_INDEX_LINE: Final = 256  # the largest size of a line in DALI's index, in bytes


@dataclass(frozen=True)
class Problem:
    """A difference between a shard set and what was written.

    Attributes:
        file: the name of the file.
        sample: the number of the sample in its split; None if the problem does not concern a single image.
        what: a description: the predicate of a sentence about the file or the sample.
    """

    file: str
    sample: int | None
    what: str

    def __str__(self) -> str:
        sample = "" if self.sample is None else f"sample {self.sample}: "
        return printable(f"{self.file}: {sample}{self.what}")


def verify(
    directory: str | os.PathLike[str], *, quick: bool = False, decode: bool = False, num_workers: int = 1
) -> Iterator[Problem]:
    """Yields every problem of a shard set as it is found.

    Args:
        directory: the shard set.
        quick: check only the structure, that is the manifest, headers, tables and labels, without reading an image.
        decode: also decode every image, which finds images that were damaged before they were written.
        num_workers: the number of threads that decode.

    Raises:
        ShardError: there is no manifest, or it cannot be read.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    yield from _quarantine(directory, manifest)
    for split in manifest.splits.values():
        first = 0
        for file in split.files:
            if split.format == "index":
                problems_here = problems_in_place(
                    directory, manifest, file, quick=quick, decode=decode, num_workers=num_workers
                )
                yield from (Problem(*found) for found in problems_here)
                continue
            reader, problems = _open(directory, manifest, file)
            yield from problems
            if not quick:
                yield from _contents(directory, file, first, reader, {problem.file for problem in problems})
            if decode and reader is not None:
                for sample, why in undecodable(reader, num_workers):
                    yield Problem(file.name, first + sample, why)
            if reader is not None and (what := _changed(reader)):
                yield Problem(file.name, None, what)
            first += file.num_samples


def _notes(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Yields notes on files in the folder that look like shards but are not part of the set. They are not problems."""
    known = {name for split in manifest.splits.values() for file in split.files for name in (file.name, *file.sidecars)}
    suffixes = {suffix for group in SIDECARS.items() for suffix in (group[0], *group[1])}
    for name in sorted(os.listdir(directory)):
        if name == UNFINISHED_NAME:
            yield f"{name}: left by a conversion that was interrupted; repeat its command, or remove the folder"
        elif Path(name).suffix in suffixes and name not in known:
            yield f"{name}: the manifest does not name it"


def _quarantine(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    path = directory / QUARANTINE_NAME
    if manifest.quarantine_sha256 is not None:
        limit = quarantine_limit(manifest)
        what = _size_problem(path, range(limit + 1), f"more than the {limit:,} that it may have")
        if what := what or _difference(path, manifest.quarantine_sha256):
            yield Problem(path.name, None, f"{what}; copy it again")
            return
        try:
            read_quarantine(directory, limit)
        except ShardError as error:
            yield Problem(path.name, None, _without_name(error, path))
    elif os.path.lexists(path) or any(split.num_quarantined for split in manifest.splits.values()):
        yield Problem(path.name, None, "the manifest has no checksum of it; convert again")


def _open(directory: Path, manifest: Manifest, file: ShardFile) -> tuple[ShardReader | None, list[Problem]]:
    """Checks the structure of a file and of the files beside it.

    Returns its reader (None if the file cannot be read) and the problems.
    """
    beside = _sidecars(file)
    try:
        reader = open_file(directory, manifest, file)
    except ShardError as error:
        what = str(error)
        starts = {name: printable(f"{directory / name}: ") for name in (file.name, *beside)}
        name = next((name for name in starts if what.startswith(starts[name])), file.name)
        return None, [Problem(name, None, what.removeprefix(starts[name]))]
    problems = []
    for name in beside:
        path, num_samples = directory / name, reader.num_samples
        if name not in file.sidecars:
            problems.append(Problem(name, None, "the manifest has no checksum of it; convert again"))
        elif not os.path.lexists(path):
            problems.append(Problem(name, None, "it is not there; copy it here or convert again"))
        elif what := _size_problem(path, _sizes(path.suffix, num_samples), f"for {num_samples:,} samples"):
            problems.append(Problem(name, None, f"{what}; copy it again"))
    return reader, problems


def _sizes(suffix: str, num_samples: int) -> range:
    """The possible sizes in bytes of the file with this suffix beside a file with `num_samples` samples."""
    if suffix == ".idx":
        return range(_INDEX_LINE * (num_samples + 1))
    size = num_samples * (CRC32_DTYPE if suffix == ".crc32" else SAMPLE_DTYPE).itemsize
    return range(size, size + 1)


def _size_problem(path: Path, sizes: range, why: str) -> str:
    """Describes what is wrong with the type or the size of a file, without reading it; "" if nothing is."""
    try:
        size = size_of(path)
    except ShardError as error:
        return _without_name(error, path).removesuffix("; copy it again")
    return "" if size in sizes else f"{size:,} bytes {why}"


def _without_name(error: ShardError, path: Path) -> str:
    return str(error).removeprefix(printable(f"{path}: "))


def _sidecars(file: ShardFile) -> list[str]:
    path = Path(file.name)
    return [path.with_suffix(suffix).name for suffix in SIDECARS[".beton" if path.suffix == ".beton" else ".tar"]]


def _contents(
    directory: Path, file: ShardFile, first: int, reader: ShardReader | None, damaged: set[str]
) -> Iterator[Problem]:
    """Compares the checksums of a file and of the files beside it, except those known to be `damaged`.

    The SHA-256 comes first, because it also covers the headers and tables. If that of the images differs, the CRC-32 of
    each sample shows which images have changed. `first` is the number of the file's first sample in its split.
    """
    for name, sha256 in file.sidecars.items():
        if name not in damaged and (what := _difference(directory / name, sha256)):
            damaged.add(name)
            yield Problem(name, None, f"{what}; copy it again")
    path = directory / file.name
    if file.name in damaged or not (what := _difference(path, file.sha256, file.hashed_from)):
        return
    table = path.with_suffix(".crc32" if path.suffix == ".beton" else ".samples")
    if what != CHANGED or reader is None or table.name in damaged:
        yield Problem(file.name, None, f"{what}; copy it again")
        return
    try:
        checksums = _checksums(table, reader.num_samples)
    except ShardError as error:
        yield Problem(table.name, None, _without_name(error, table))
        return
    samples = [i for i in range(reader.num_samples) if zlib_ng.crc32(reader.encoded(i).data) != checksums[i]]
    for sample in samples:
        yield Problem(file.name, first + sample, "its image has changed (CRC-32); copy the file again")
    if not samples:
        yield Problem(
            file.name, None, "has changed outside of the images: header, labels, tables or padding; copy it again"
        )


def _checksums(table: Path, num_samples: int) -> np.ndarray:
    """The CRC-32 of each image: uint32 (num_samples,)."""
    dtype = CRC32_DTYPE if table.suffix == ".crc32" else SAMPLE_DTYPE
    content = read_whole(table, num_samples * dtype.itemsize, "its samples take")
    if len(content) != num_samples * dtype.itemsize:
        raise ShardError(f"{table}: {len(content):,} bytes for {num_samples:,} samples; copy it again")
    records: np.ndarray = np.frombuffer(content, dtype)
    return records if table.suffix == ".crc32" else records["crc32"]


def _difference(path: Path, sha256: str, hashed_from: int = 0) -> str:
    """Describes what is wrong with the contents of a file; "" if nothing is."""
    try:
        return "" if sha256_of(path, hashed_from) == sha256 else CHANGED
    except ShardError as error:
        return _without_name(error, path).removesuffix("; copy it again")
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _changed(reader: ShardReader) -> str:
    """Describes what happened to a file while it was read; "" if nothing did."""
    try:
        reader.check(np.arange(reader.num_samples))
    except ShardError as error:
        return _without_name(error, reader.path)
    return ""


def _summary(manifest: Manifest, outcome: str) -> str:
    samples = sum(split.num_samples for split in manifest.splits.values())
    size = sum(file.bytes for split in manifest.splits.values() for file in split.files)
    return printable(f"{samples:,} samples in {', '.join(sorted(manifest.splits))}, {size:,} bytes: {outcome}")


def _has_checksums(directory: Path, manifest: Manifest) -> bool:
    """Whether there is a checksum of each image, which the index of a split in place may not have."""
    for split in manifest.splits.values():
        for file in split.files:
            with contextlib.suppress(ShardError):
                if split.format == "index" and not has_checksums(MappedFile(directory / file.name)):
                    return False
    return True


def run(arguments: argparse.Namespace) -> int:
    """Prints each problem to stderr, and a summary. Returns 1 if there are problems, else 0."""
    found = 0
    options = {"quick": arguments.quick, "decode": arguments.decode}
    for problem in verify(arguments.shards, **options, num_workers=arguments.workers):
        found += 1
        print_note(str(problem))
    manifest = read_manifest(arguments.shards)
    in_place = any(split.format == "index" for split in manifest.splits.values())
    with_checksums = _has_checksums(arguments.shards, manifest)
    decoded = arguments.decode or not with_checksums
    checked = "structure" + ", files" * in_place
    if not arguments.quick:
        checked += ", checksums" * with_checksums + ", decoding of every image" * decoded
        if not with_checksums:
            print("note: no checksums to compare with; adopt --checksums --replace would store them")
    for note in _notes(arguments.shards, manifest):
        print(printable(f"note: {note}"))
    problems = f"{found:,} problem{'s' * (found > 1)}" if found else f"nothing is wrong ({checked})"
    print(_summary(manifest, problems))
    if not found:
        for line in next_lines(*(training(arguments.shards) or sdpnet("describe", arguments.shards))):
            print(line)
    return 1 if found else 0


def main(argv: list[str] | None = None, program: str = "verify") -> int:
    """The command line; returns the exit status."""
    return run_alone(program, "Checks a shard set from end to end.", add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
