"""Times sources of a conversion against each other: python tests/support/container_speed.py --images DIR [--json FILE]

DIR has images in class folders. A Parquet file (100 rows in a group) and a WebDataset tar (KEY.jpg, KEY.cls and
KEY.json, with the PAX records of the webdataset library) are made of them, repeated. In each round, these take turns:

    headers, tarfile      the members of the tar, read by our reader of headers and by Python's tarfile
    list tars             the images, labels and class names of the tar
    list Parquet          the rows and labels of the Parquet file, with the start of its process
    folder, Parquet, tars encoding the images of each source in worker processes, as a conversion does

The page cache is warm. Rates are a second's members or images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from container_files import write_parquet

from sdpnet.preprocess.encoding.encode import EncodeSettings
from sdpnet.preprocess.sources.files.tar_members import TarMembers, TarWindow, entries
from sdpnet.preprocess.sources.listing import SplitImages
from sdpnet.preprocess.sources.parquet.listing import list_parquet
from sdpnet.preprocess.sources.scan import scan
from sdpnet.preprocess.sources.webdataset import list_tars
from sdpnet.preprocess.workers.pool import Workers


def make(images: Path, repeat: int, folder: Path) -> tuple[Path, Path, Path, int]:
    """Makes links to the images in class folders, the Parquet file and the tar; also returns the number of images."""
    import webdataset

    names = sorted(path.name for path in images.iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(names) for path in sorted((images / name).iterdir())] * repeat
    links, tar = folder / "images", folder / "tars" / "train-0.tar"
    tar.parent.mkdir()
    with webdataset.TarWriter(str(tar), encoder=False) as writer:
        for number, (path, label) in enumerate(files):
            link = links / names[label] / f"{number:08}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
            fields = json.dumps({"label": label, "class_name": names[label], "filename": path.name})
            sample = {"jpg": path.read_bytes(), "cls": str(label).encode(), "json": fields.encode()}
            writer.write({"__key__": f"{number:08}", **sample})
    parquet = folder / "parquet" / "train-0.parquet"
    write_parquet(parquet, [path.read_bytes() for path, _ in files], [label for _, label in files], names, rows=100)
    return links, parquet, tar, len(files)


def members(path: Path, read: Callable[[TarWindow, str], Any]) -> int:
    with path.open("rb", buffering=0) as file:
        return sum(1 for _ in read(TarWindow(file.fileno(), 0, os.fstat(file.fileno()).st_size), path.name))


def encoded(split: SplitImages, workers: Workers) -> int:
    return sum(1 for _ in workers.encode(split.locate, 0, split.num_images))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times sources of a conversion against each other.")
    parser.add_argument("--images", type=Path, metavar="DIR", required=True, help="images in class folders")
    parser.add_argument("--repeat", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--reencode", default="always", help="default: %(default)s")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for the sources (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    settings = EncodeSettings(reencode=arguments.reencode)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch, Workers(settings, arguments.workers) as workers:
        links, parquet, tar, count = make(arguments.images, arguments.repeat, Path(scratch))
        splits = {"folder": links, "Parquet": parquet, "tars": tar}
        found = {name: scan(path).splits["train"] for name, path in splits.items()}
        timed: dict[str, Callable[[], Any]] = {
            "headers": lambda: members(tar, TarMembers),
            "tarfile": lambda: members(tar, entries),
            "list tars": lambda: list_tars(tar.parent, [tar]),
            "list Parquet": lambda: list_parquet([parquet]),
            **{name: lambda split=split: encoded(split, workers) for name, split in found.items()},
        }
        rates: dict[str, list[float]] = {name: [] for name in timed}
        for round_ in range(arguments.rounds + 1):
            for name in timed if round_ % 2 == 0 else reversed(timed):
                start = time.perf_counter()
                timed[name]()
                rate = count * (3 if name in ("headers", "tarfile") else 1) / (time.perf_counter() - start)
                if round_:  # the first round warms up
                    rates[name].append(round(rate, 1))
                    print(f"round {round_}: {name}: {rate:,.0f} a second", file=sys.stderr, flush=True)
    result = {name: {"rates": values, "median": statistics.median(values)} for name, values in rates.items()}
    print("\n".join(f"{name:13} {entry['median']:>10,.0f} a second" for name, entry in result.items()))
    if arguments.json:
        facts = {"num_images": count, "workers": arguments.workers, "reencode": arguments.reencode}
        arguments.json.write_text(json.dumps({**facts, "results": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
