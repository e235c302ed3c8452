"""Finds the splits of a source by the names of its folders and archives. The case of folder names does not matter.

train    train, training, or ILSVRC2012_img_train.tar
val      val, valid, validation, or ILSVRC2012_img_val.tar; test only if it is given with `--val`
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.files.links import is_folder

__all__ = ["find_splits", "is_name_of_split", "likely_splits", "named_test"]

_FOLDERS: Final = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_ARCHIVES: Final = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_WORDS: Final = frozenset(
    ("train", "trainset", "training", "val", "valset", "valid", "validation", "test", "testset", "testing")
)


def find_splits(source: Path, given: dict[str, Path], is_output: Callable[[Path], bool]) -> dict[str, Path]:
    """Returns the folder or archive of each split: that in `given`, or otherwise that found in `source`.

    If a source has no train split, it is the train split itself, and its folders are the classes. Folders for which
    `is_output` is true contain only the output and are ignored.

    Raises:
        UserError: a split has two candidates, or there is val or test without train.
    """
    if not source.is_dir():
        return {"train": source} | given
    folders = sorted(entry.name for entry in os.scandir(source) if is_folder(entry) and not is_output(Path(entry.path)))
    found = dict(given)
    for split in ("train", "val"):
        if split not in given and (path := _find(source, split, folders)) is not None:
            found[split] = path
    if "train" not in found:
        others = [folder + "/" for folder in folders if folder.lower() in _FOLDERS["test"]]
        if "val" in found and "val" not in given:
            others.insert(0, found["val"].name + "/" * found["val"].is_dir())
        if others:
            raise UserError(f"{source}: has {others[0]} but no train/; name the training images with --train")
        found["train"] = source
    if "val" in found and "val" not in given and found["train"].samefile(found["val"]):
        raise UserError(
            f"{source}: {found['val'].name}/ is a link to the train split, so the model would be evaluated on its "
            "training images; name others with --val, or remove the link and draw some with --val-share"
        )
    return {split: found[split] for split in ("train", "val") if split in found}


def named_test(source: Path) -> Path | None:
    """The folder of test images of the source, if it has class folders; None otherwise."""
    folders = [source / name for name in sorted(os.listdir(source))] if source.is_dir() else []
    for folder in folders:
        if (
            folder.name.lower() in _FOLDERS["test"]
            and folder.is_dir()
            and any(path.is_dir() for path in folder.iterdir())
        ):
            return folder
    return None


def likely_splits(classes: Iterable[str], nested: Iterable[str]) -> list[str]:
    """Returns the class folders that, by their names, seem to be splits with class folders in them.

    A single folder such as `test_tube` may be a class. A folder `test` with folders in it, or two folders such as
    `seg_train` and `seg_test`, are taken for splits.

    Args:
        classes: all class folders.
        nested: the class folders whose images all lie in folders below them.
    """
    named = [name for name in sorted(classes) if not _WORDS.isdisjoint(re.split("[^a-z]+", name.lower()))]
    found = set(named).intersection(nested)
    is_clear = len(named) > 1 or any(name.lower() in _WORDS for name in found)
    return [name for name in named if name in found] if is_clear else []


def is_name_of_split(folder: str) -> bool:
    """Whether the name of a folder is exactly that of a split."""
    return folder.lower() in _WORDS


def _find(source: Path, split: str, folders: list[str]) -> Path | None:
    candidates = [folder for folder in folders if folder.lower() in _FOLDERS[split]]
    if len(candidates) > 1:
        names = " and ".join(f"{name}/" for name in candidates)
        raise UserError(f"{source}: {names} may each be the {split} split; name the right one with --{split}")
    if candidates:
        return source / candidates[0]
    archive = source / _ARCHIVES[split]
    return archive if archive.is_file() else None
