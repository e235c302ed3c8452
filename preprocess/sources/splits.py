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
from sdpnet.preprocess.sources.listing import Gathered

__all__ = [
    "IMAGENET_ARCHIVES",
    "find_splits",
    "is_name_of_split",
    "likely_splits",
    "named_test",
    "refuse_splits",
    "split_of_name",
]

_FOLDERS: Final = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
IMAGENET_ARCHIVES: Final = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
_ARCHIVES: Final = dict(zip(("train", "val"), IMAGENET_ARCHIVES, strict=True))
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


def refuse_splits(found: Gathered, root: Path, classes: list[str], *, is_source: bool, is_given: bool = False) -> None:
    """Raises `UserError` if the folders seem to contain class folders instead of being class folders themselves.

    Args:
        found: the images of `root`.
        root: the folder of the train split.
        classes: the names of its class folders.
        is_source: whether `root` is the source itself, so that no name says that it has class folders.
        is_given: whether the user gave `root` as the train split.
    """
    deep = sorted(set(classes) - {name for name, below in found.places if not below})
    splits = likely_splits(classes, deep)
    if is_source and splits:
        first = next((name for name in splits if "train" in name.lower()), splits[0])
        raise UserError(
            f"{root}: {' and '.join(f'{name}/' for name in splits[:2])} seem{'s' * (len(splits) == 1)} to hold class "
            f"folders; name the splits, such as --train {root / first}, and --val; if they are classes: --train {root}"
        )
    others = [] if is_given else list(filter(is_name_of_split, deep))
    if others and len(classes) > 1:
        raise UserError(
            f"{root}: {others[0]}/ seems to hold class folders of another split; name it with --val "
            f"{root / others[0]}, or move it out of {root.name}/; if it is a class: --train {root}"
        )
    if len(classes) == 1 and deep and (is_source or splits or deep[0] == root.name):
        raise UserError(
            f"{root}: all images lie in folders below its only folder, {deep[0]}/; name that in its place: "
            f"{root / deep[0]}" + f" (if it is the only class: --train {root})" * is_source
        )


def split_of_name(name: str, *, whole: bool = False) -> str | None:
    """The split that the first word of a name (without suffix) points to: "train", "val", "test" or None.

    With `whole`, the whole name must be a word such as "train".
    """
    words = [name.lower()] if whole else re.split("[^a-z]+", name.lower())
    return next((split for word in words for split, names in _FOLDERS.items() if word in names), None)


def _find(source: Path, split: str, folders: list[str]) -> Path | None:
    candidates = [folder for folder in folders if folder.lower() in _FOLDERS[split]]
    if len(candidates) > 1:
        names = " and ".join(f"{name}/" for name in candidates)
        raise UserError(f"{source}: {names} may each be the {split} split; name the right one with --{split}")
    if candidates:
        return source / candidates[0]
    archive = source / _ARCHIVES[split]
    return archive if archive.is_file() else None
