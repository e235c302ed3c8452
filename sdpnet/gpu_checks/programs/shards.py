"""Makes the shard set of a run from class folders of images, each image many times: a small folder becomes an epoch.

    python -m sdpnet.gpu_checks.programs.shards --images FOLDER --out SHARDS --at-least 10000

FOLDER has class folders, or `train/` and `val/` with class folders in them. The images are linked, not copied, and
converted by `build_ffcv`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path

from sdpnet.gpu_checks.programs.commands import run_module
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["add_arguments", "main", "repeated", "run"]


def repeated(images: Path, out: Path, at_least: int) -> int:
    """Links each training image often enough for an epoch of `at_least` images. Returns how often.

    Raises:
        UserError: there are no images in class folders.
    """
    train, val = (images / name if (images / name).is_dir() else images for name in ("train", "val"))
    found = [path for path in sorted(train.glob("*/*")) if path.is_file()]
    if not found:
        raise UserError(f"{images}: has no images in class folders")
    copies = max(1, -(-at_least // len(found)))
    for split, files, count in (("train", found, copies), ("val", sorted(val.glob("*/*")), 1)):
        for path in files:
            folder = out / split / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                target = folder / f"{number}_{path.name}"
                with contextlib.suppress(FileExistsError):
                    try:
                        os.link(path, target)
                    except OSError:  # another file system
                        shutil.copyfile(path, target)
    return copies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="FOLDER", help="class folders of images")
    add("--out", type=Path, required=True, metavar="SHARDS", help="shard set to make")
    add("--at-least", type=int, default=10_000, metavar="N", help="training images (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    links = arguments.out.with_name(f"{arguments.out.name}-images")
    copies = repeated(arguments.images, links, arguments.at_least)
    print(f"{arguments.images}: each training image {copies} times", flush=True)
    words = ["--source", str(links), "--out", str(arguments.out), "--reencode", "auto"]
    run_module("sdpnet.preprocess.build_ffcv", words)
    shutil.rmtree(links)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_alone("shards", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
