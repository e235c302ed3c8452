"""Command: makes a shard set of what is there, without a conversion.

    sdpnet adopt --source IMAGENET --out SHARDS

    IMAGENET/{train,val}/CLASS/*.jpg, or tars  ->  SHARDS/{train,val}.index, SHARDS/manifest.json

The images stay where they are, and only their headers are read (`sdpnet.preprocess.adoption`). The few that are no
plain JPEGs are converted to SHARDS/{train,val}.converted.

    sdpnet adopt --train SHARDS/train.beton --val SHARDS/val.beton

    SHARDS/{train,val}.beton  ->  SHARDS/{train,val}.crc32, SHARDS/manifest.json

`.beton` files that were written by FFCV must lie in one folder, have names that end in .beton, and have FFCV's usual
fields: image (RGBImageField) and label (IntField).
"""

from __future__ import annotations

import argparse
import codecs
import sys
from itertools import combinations
from pathlib import Path
from typing import Final

if not __package__:  # run as a file: import sdpnet from the checkout, and no module of this folder by its bare name
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    from sdpnet import preprocess  # noqa: F401 - from here on, Ctrl-C ends the command with one line

import numpy as np
from zlib_ng import zlib_ng

from sdpnet.pipelines.errors import ShardError, UserError, printable
from sdpnet.pipelines.files.atomic_write import holds, publish_bytes
from sdpnet.pipelines.machine import core_share
from sdpnet.pipelines.shards.beton import CRC32_DTYPE, MODE_JPEG, BetonReader
from sdpnet.pipelines.shards.layout import sha256_of
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME, QUARANTINE_NAME, Manifest, ShardFile, Split
from sdpnet.pipelines.terminal.command_line import run_alone
from sdpnet.pipelines.terminal.next_step import next_lines, sdpnet
from sdpnet.preprocess.adoption import command
from sdpnet.preprocess.conversion.progress import Meter
from sdpnet.preprocess.flags.adopt import add_arguments
from sdpnet.preprocess.inspection.undecodable import undecodable
from sdpnet.preprocess.verify import verify

__all__ = ["add_arguments", "adopt", "main", "run"]

MAX_CLASSES: Final = 1_000_000  # the number of classes that get names automatically
MAX_CLASSES_BYTES: Final = 1 << 26  # the size of a file of class names


def adopt(paths: dict[str, Path], classes: tuple[str, ...] | None = None, *, decode: bool = False) -> Manifest:
    """Makes a shard set of `.beton` files of another program: writes their checksums and the manifest beside them.

    Args:
        paths: the file of each split, by the split's name.
        classes: `classes[label]`; by default the labels themselves, from 0 to the largest.
        decode: decode every image first, as training does.

    Raises:
        UserError: the files lie in several folders, are the same file, or do not end in `.beton`; the folder has a
            manifest or another file that would be written; or a label has no class. No file is left behind.
        ShardError: a file is not a valid `.beton` file, or has an image that cannot be decoded.
    """
    folder = _folder_of(paths)
    readers = {split: BetonReader(path) for split, path in paths.items()}
    classes = _classes(list(readers.values()), classes)
    if decode:
        for reader in readers.values():
            _require_decodable(reader)
    tables = {split: _checksums(split, reader) for split, reader in readers.items()}
    created: list[Path] = []
    try:
        splits = {}
        for split, reader in readers.items():
            table = folder / f"{reader.path.stem}.crc32"
            if not table.exists():
                created.append(table)
            elif not holds(table, tables[split]):
                raise UserError(f"{table}: exists already and does not belong to {reader.path.name}; move it elsewhere")
            publish_bytes(table, tables[split])
            splits[split] = _describe(reader, table)
        shards = [split.files[0] for split in splits.values()]
        if len({shard.sha256 for shard in shards}) < len(shards):
            raise UserError(f"{folder}: {' and '.join(shard.name for shard in shards)} have the same contents")
        for split, path in paths.items():
            if not readers[split].file.has_its_name():
                raise UserError(f"{path}: has changed while it was read; repeat the command when nobody writes it")
        source = ", ".join(path.name for path in paths.values())
        encode = {"encoder": "another program"}
        manifest = Manifest(source, classes, encode, splits, "another program, adopted by sdpnet")
        created.append(folder / MANIFEST_NAME)
        publish_bytes(folder / MANIFEST_NAME, manifest.to_json().encode())
        for problem in verify(folder, quick=True):
            raise UserError(f"{folder}: cannot become a shard set: {problem}")
    except BaseException:
        for path in created:
            path.unlink(missing_ok=True)
        raise
    return manifest


def _require_decodable(reader: BetonReader) -> None:
    bad = list(undecodable(reader, core_share()))
    if bad:
        sample, why = bad[0]
        more = f", and {len(bad) - 1:,} more are bad" if len(bad) > 1 else ""
        raise ShardError(f"{reader.path}: sample {sample}: {why}{more}; write the file again without them")


def _folder_of(paths: dict[str, Path]) -> Path:
    """The folder of all files. The folder of a link is the one that contains the link."""
    folders = {path.parent.resolve() for path in paths.values()}
    if len(folders) != 1:
        raise UserError(f"{', '.join(map(str, paths.values()))}: must lie in one folder, which becomes the shard set")
    folder = folders.pop()
    for path in paths.values():
        if path.suffix != ".beton":
            raise UserError(f"{path}: its name must end in .beton in a shard set; rename it")
    for one, other in combinations(paths.values(), 2):
        if one.exists() and other.exists() and one.samefile(other):
            raise UserError(f"{one}: the same file for two splits; the model would be evaluated on its training images")
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder}: there is a {MANIFEST_NAME} already, so the folder is a shard set")
    if (folder / QUARANTINE_NAME).exists():
        raise UserError(f"{folder / QUARANTINE_NAME}: would belong to the shard set; move it elsewhere")
    return folder


def _classes(readers: list[BetonReader], classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of all classes: `classes`, or the labels if it is None."""
    if not any(reader.num_samples for reader in readers):
        raise UserError(f"{readers[0].path}: has no samples, so there is nothing to adopt")
    if classes is None:
        highest = max(int(reader.labels.max(initial=-1)) for reader in readers)
        if highest >= MAX_CLASSES:
            reader = next(reader for reader in readers if int(reader.labels.max(initial=-1)) == highest)
            raise UserError(
                f"{reader.path}: sample {int(reader.labels.argmax())}: label {highest}, so that there would be "
                f"{highest + 1:,} classes; write it again with labels from 0 on, or name the classes with --classes"
            )
        classes = tuple(map(str, range(highest + 1)))
    for reader in readers:
        if reader.num_samples and not 0 <= reader.labels.min() <= reader.labels.max() < len(classes):
            lowest, highest = reader.labels.min(), reader.labels.max()
            raise UserError(f"{reader.path}: labels from {lowest} to {highest}, but there are {len(classes)} classes")
    return classes


def _checksums(split: str, reader: BetonReader) -> bytes:
    """The contents of the file with the CRC-32 of each image."""
    checksums = np.zeros(reader.num_samples, CRC32_DTYPE)
    with Meter(split, 0, reader.num_samples) as meter:
        for sample in range(reader.num_samples):
            checksums[sample] = zlib_ng.crc32(reader.encoded(sample).data)
            meter.advance(0)
    return checksums.tobytes()


def _describe(reader: BetonReader, table: Path) -> Split:
    """The manifest's description of a split of one file. `table` is the file with the checksums of its images."""
    sidecars = {table.name: sha256_of(table)}
    size = reader.path.stat().st_size
    file = ShardFile(reader.path.name, reader.num_samples, size, sha256_of(reader.path), sidecars)
    kept = int((reader.modes == MODE_JPEG).sum())
    return Split(reader.num_samples, "beton", (file,), num_kept=kept)


def _read_classes(path: Path) -> tuple[str, ...]:
    """Reads class names from a text file with one name in each line. Raises `UserError` for any other file."""
    if not path.exists() or path.is_dir():
        raise UserError(f"--classes {path}: {'is a directory' if path.is_dir() else 'is not there'}; name a text file")
    if not path.is_file() or path.stat().st_size > MAX_CLASSES_BYTES:
        raise UserError(f"--classes {path}: not a text file of class names, one a line")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            where = "it is UTF-16"
        else:
            where = f"line {content.count(10, 0, error.start) + 1}: the byte 0x{content[error.start]:02x}"
        raise UserError(f"--classes {path}: not UTF-8 ({where}); save it as UTF-8") from None
    names = text.replace("\r\n", "\n").split("\n")
    names = names[:-1] if names[-1] == "" else names
    for number, name in enumerate(names, 1):
        if not name.strip() or "\0" in name:
            raise UserError(f"--classes {path}: line {number}: no class name; give one name a line, in label order")
    if not names:
        raise UserError(f"--classes {path}: is empty; give one name a line, in label order")
    return tuple(names)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with parsed flags and returns the exit status."""
    paths = {split: Path(path) for split in ("train", "val") if (path := getattr(arguments, split)) is not None}
    betons = [path for path in paths.values() if path.suffix == ".beton"]
    if arguments.out is not None:
        if betons:
            raise UserError(f"{betons[0]}: a .beton file becomes a shard set where it lies; omit --out")
        if arguments.classes is not None:
            raise UserError("--classes: the names of the classes are those of the class folders; omit it")
        return command.run(arguments)
    if arguments.source is not None or (paths and not betons):
        raise UserError("--out is missing: the folder for the index of the images; the images stay where they are")
    if not paths:
        raise UserError("no file given: pass --source IMAGES --out DIR, or .beton files with --train and --val")
    classes = None if arguments.classes is None else _read_classes(arguments.classes)
    manifest = adopt(paths, classes, decode=arguments.decode)
    folder = next(iter(paths.values())).parent
    counts = ", ".join(f"{name} {split.num_samples:,}" for name, split in manifest.splits.items())
    print(f"{printable(folder)}: a shard set now: {counts}, {manifest.num_classes:,} classes")
    for line in next_lines(*sdpnet("verify", folder)):
        print(line)
    return 0


def main(argv: list[str] | None = None, program: str = "adopt") -> int:
    """The command line; returns the exit status."""
    what = "Makes a shard set of images where they lie, or of .beton files by FFCV."
    return run_alone(program, what, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
