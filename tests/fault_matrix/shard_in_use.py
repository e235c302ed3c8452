"""Shard sets that are replaced, cut or overwritten between their opening and their reading, and while they are read."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shard_reading import Ended, attempt, loader_of
from trial import Outcome

from sdpnet.pipelines.contract import Loader
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.verify import verify

__all__ = ["trial"]

_loaders: dict[str, list[Any]] = {}  # of whole sets, by what was asked for: the batches that they give


def replaced(path: Path, rng: random.Random) -> None:
    """Another file takes the name; the old one lives on."""
    other = path.with_name("other")
    content = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        content = bytearray(len(content))
    elif kind == 1:
        content = content[: rng.randrange(len(content))]
    elif kind == 2:
        content = bytearray(rng.randbytes(len(content)))
    else:  # the same layout with other labels and images
        for _ in range(100):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    other.write_bytes(content)
    other.replace(path)


def removed(path: Path, rng: random.Random) -> None:
    path.unlink()


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.choice((0, 1, 4096, rng.randrange(path.stat().st_size))))


def overwritten(path: Path, rng: random.Random) -> None:
    """In place, as `cp` does: cut to nothing, and then written again."""
    size = path.stat().st_size
    with path.open("wb" if rng.random() < 0.5 else "r+b") as file:
        file.write(rng.randbytes(size))


def extended(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 512, 1 << 20))))


SAFE: tuple[Callable[[Path, random.Random], None], ...] = (replaced, removed)
IN_PLACE: tuple[Callable[[Path, random.Random], None], ...] = (cut, overwritten, extended)


def read(loader: Loader, before_batch: Callable[[int], None] = lambda index: None) -> list[tuple[int, bytes]]:
    """Of each batch a checksum of its images, and its labels."""
    found = []
    with contextlib.closing(loader.batches(1)) as batches:
        for index, batch in enumerate(batches):
            found.append((zlib.crc32(batch.images.numpy().tobytes()), batch.labels.numpy().tobytes()))
            before_batch(index + 1)
    return found


def trial(prepared: Path, kind: str, seed: int, scratch: Path) -> Outcome:
    rng = random.Random(f"{kind} {seed}")
    pipeline = kind.rpartition(" ")[2]
    in_place = "in place" in kind
    format = "beton" if pipeline == "ffcv" else "index" if in_place else rng.choice(("beton", "tar"))
    folder = scratch / f"set{seed}" / format
    shutil.copytree(prepared / format, folder)
    split = rng.choice(("train", "val"))
    path = rng.choice(sorted(folder.glob(f"{split}*.{format}")))
    if in_place:  # the images have the times of the originals, which the index has
        images = shutil.copytree(prepared / "images", folder.with_name("images"))
        if rng.random() < 0.8:
            path = rng.choice(sorted(path for path in (images / split).glob("*/*") if path.name != "bad.jpg"))
    change = rng.choice((*SAFE, *IN_PLACE, *IN_PLACE))
    when = rng.choice(("before", "between", "beside"))
    options = {"num_workers": rng.choice((1, 1, 1, 2))} if pipeline == "torchvision" else {"num_workers": 2}
    what = f"{pipeline}, {path.name}, {change.__name__} {when} {options}"
    try:
        outcome = _outcome(prepared / format, folder, path, split, pipeline, change, when, options, rng)
    except Ended as ended:
        outcome = Outcome(ended.verdict, f"{what}: {ended}")
    shutil.rmtree(folder.parent, ignore_errors=True)
    return outcome


def _outcome(
    whole: Path,
    folder: Path,
    path: Path,
    split: str,
    pipeline: str,
    change: Callable[[Path, random.Random], None],
    when: str,
    options: dict[str, int],
    rng: random.Random,
) -> Outcome:
    key = f"{whole.name} {split} {pipeline}"
    if key not in _loaders:
        with contextlib.closing(loader_of(whole, pipeline, split, **options)) as loader:
            _loaders[key] = read(loader)
    expected = _loaders[key]
    done = False

    def now(index: int = 0) -> None:
        nonlocal done
        if not done:
            done = True
            change(path, rng)

    loader = loader_of(folder, pipeline, split, **options)
    thread = threading.Thread(target=lambda: (time.sleep(rng.random() / 50), now()))
    if when == "before":
        now()
    elif when == "beside":
        thread.start()
    last = rng.randrange(1, len(expected))  # batches that are read before the change
    found, end = attempt("reading", lambda: read(loader, lambda index: now() if index == last else None))
    if thread.ident is not None:
        thread.join()
    attempt("closing", loader.close)
    if found is not None and found != expected:
        raise Ended("wrong", "other images or labels, and no error")
    is_image = path.suffix == ".jpg"  # opened only when it is read, and some are not read in an epoch
    if change in SAFE and end and not is_image:
        raise Ended("wrong", f"the file that was opened is whole, but {end}")
    tars = path.suffix == ".tar"  # of which a batch reads some only
    if change in IN_PLACE and when != "beside" and not end and not tars and not is_image:
        raise Ended("wrong", "no error")
    if end and path.name not in end:
        raise Ended("wrong", f"the error does not name the file: {end}")
    attempt("verify", lambda: list(verify(folder, decode=True)))
    attempt("opening", lambda: open_split(folder, split))
    return Outcome("ok", group="refused" if end else "went on")
