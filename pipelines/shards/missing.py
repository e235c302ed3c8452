"""Explains why a path is no shard set, and says the command that makes one of what is there."""

from __future__ import annotations

import os
import re
import shlex
from itertools import islice
from pathlib import Path
from typing import Final

__all__ = ["why_no_shard_set"]

_LOOKED_AT: Final = 1_000  # the number of entries of a folder
_IMAGE: Final = re.compile(r".*\.(jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|ppm|pgm|avif|jp2)", re.IGNORECASE)
_SPLIT: Final = re.compile("train|training|val|valid|validation|test", re.IGNORECASE)


def why_no_shard_set(path: Path, manifest_name: str) -> str:
    """Part of a message about a path without a manifest: why it is no shard set, and what to do.

    Args:
        path: the path that was given as a shard set.
        manifest_name: the name of the file that a shard set has.
    """
    if path.is_file():
        folder = path.parent
        if (folder / manifest_name).is_file():
            return f"a file of a shard set; give its folder, {folder}"
        if path.suffix == ".beton":
            return "a .beton file, not a shard set; sdpnet adopt makes one of it"
        if path.suffix == ".tar":
            return f"a tar, not a shard set; to use its images where they lie: {_adopt('--train', path)}"
        return "a file, not a shard set; give the folder that sdpnet convert made"
    wrong = f"no {manifest_name} here, so it is not a shard set"
    if (path / "metrics.jsonl").is_file():
        return f"{wrong}, but a run (sdpnet report shows it); give the shard set that it was trained on"
    if _holds(path, ".parquet"):
        convert = f"sdpnet convert --source {_quoted(path)} --out SHARDS"
        return f"{wrong}, but Parquet files; to convert them: {convert}"
    if _holds_images(path) or _holds(path, ".tar"):
        what = "images" if _holds_images(path) else "tars"
        return f"{wrong}, but a folder of {what}; to use them where they lie: {_adopt('--source', path)}"
    return f"{wrong} (make one with sdpnet convert)"


def _adopt(flag: str, path: Path) -> str:
    return f"sdpnet adopt {flag} {_quoted(path)} --out SHARDS"


def _quoted(path: Path) -> str:
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The first entries of a folder, or none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, _LOOKED_AT))
    except OSError:
        return []


def _holds(folder: Path, suffix: str) -> bool:
    return any(entry.name.endswith(suffix) for entry in _entries(folder))


def _holds_images(folder: Path) -> bool:
    """Whether a folder has class folders, or splits with class folders. Only the first entries are looked at."""
    folders = [entry for entry in _entries(folder) if _is_folder(entry)]
    splits = [entry for entry in folders if _SPLIT.fullmatch(entry.name)]
    return any(map(_is_class, folders)) or any(
        _is_class(entry) for split in splits for entry in _entries(split.path) if _is_folder(entry)
    )


def _is_class(folder: os.DirEntry[str]) -> bool:
    return any(_IMAGE.fullmatch(entry.name) for entry in _entries(folder.path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
