"""Command: makes a shard set of `.beton` files that FFCV's own writer has made, as they are.

    python preprocess/adopt.py --train SHARDS/train.beton --val SHARDS/val.beton

    SHARDS/{train,val}.beton  ->  SHARDS/{train,val}.crc32, SHARDS/manifest.json

The files must lie in one folder and have FFCV's usual fields: image (RGBImageField) and label (IntField).
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

if not __package__:  # run as a file: import from the checkout, and nothing by its bare name from this folder
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent)] + [entry for entry in sys.path if Path(entry).resolve() != here]
    import preprocess  # noqa: F401 - from here on, Ctrl-C ends with one line

import numpy as np

from pipelines.beton_reader import CRC32_DTYPE, MODE_JPEG, BetonReader
from pipelines.command_line import CommandParser
from pipelines.errors import UserError, printable, run_command
from pipelines.layout import MANIFEST_NAME, Manifest, ShardFile, Split, sha256_of
from pipelines.next_step import next_line, script
from pipelines.publish import publish_bytes
from preprocess.progress import Meter

__all__ = ["adopt", "main"]


def adopt(paths: dict[str, Path], classes: tuple[str, ...] | None = None) -> Manifest:
    """Writes the checksums and the manifest of a shard set of foreign `.beton` files, beside them.

    Args:
        paths: the file of each split, by the split's name.
        classes: `classes[label]`; by default the labels themselves, up to the largest.

    Raises:
        UserError: there is a manifest, the files lie in several folders, or a label has no class.
        ShardError: a file is not a valid `.beton` file.
    """
    folders = {path.resolve().parent for path in paths.values()}
    if len(folders) != 1:
        raise UserError(f"{', '.join(map(str, paths.values()))}: must lie in one folder, which becomes the shard set")
    folder = folders.pop()
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder}: there is a {MANIFEST_NAME} already; it is a shard set, which needs nothing")
    readers = {split: BetonReader(path) for split, path in paths.items()}
    num_classes = 1 + max(int(reader.labels.max(initial=-1)) for reader in readers.values())
    classes = classes or tuple(map(str, range(num_classes)))
    for reader in readers.values():
        if reader.num_samples and not 0 <= reader.labels.min() <= reader.labels.max() < len(classes):
            lowest, highest = reader.labels.min(), reader.labels.max()
            raise UserError(f"{reader.path}: labels from {lowest} to {highest}, but there are {len(classes)} classes")
    splits = {split: _adopt_file(folder, split, reader) for split, reader in readers.items()}
    source = ", ".join(path.name for path in paths.values())
    manifest = Manifest(source, classes, {"encoder": "another program"}, splits, "another program, adopted by sdpnet")
    publish_bytes(folder / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def _adopt_file(folder: Path, split: str, reader: BetonReader) -> Split:
    """The split of one file, whose images' checksums are written beside it."""
    checksums = np.zeros(reader.num_samples, CRC32_DTYPE)
    with Meter(split, 0, reader.num_samples) as meter:
        for sample in range(reader.num_samples):
            checksums[sample] = zlib.crc32(reader.encoded(sample).data)
            meter.advance(0)
    table = folder / f"{reader.path.stem}.crc32"
    publish_bytes(table, checksums.tobytes())
    sidecars = {table.name: sha256_of(table)}
    size = reader.path.stat().st_size
    file = ShardFile(reader.path.name, reader.num_samples, size, sha256_of(reader.path), sidecars)
    kept = int((reader.modes == MODE_JPEG).sum())
    return Split(reader.num_samples, "beton", (file,), num_kept=kept)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = CommandParser("adopt", description="Makes a shard set of .beton files by FFCV, as they are.")
    parser.add_argument("--train", type=Path, metavar="FILE", help=".beton file of the train split")
    parser.add_argument("--val", type=Path, metavar="FILE", help=".beton file of the val split")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line, in label order")
    arguments = parser.parse_args(argv)

    def run() -> int:
        paths = {split: path for split in ("train", "val") if (path := getattr(arguments, split)) is not None}
        if not paths:
            raise UserError("no file given: pass --train FILE, --val FILE or both")
        classes = None
        if arguments.classes is not None:
            classes = tuple(arguments.classes.read_text(encoding="utf-8").split("\n"))
            classes = classes[:-1] if classes[-1:] == ("",) else classes
        manifest = adopt(paths, classes)
        folder = next(iter(paths.values())).parent
        counts = ", ".join(f"{name} {split.num_samples:,}" for name, split in manifest.splits.items())
        print(f"{printable(folder)}: a shard set now: {counts}, {manifest.num_classes:,} classes")
        print(next_line(*script("verify", folder)))
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
