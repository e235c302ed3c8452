"""Lists an image data set: which classes there are, and which image belongs to which, in a fixed order.

SOURCE/train/CLASS/image.jpg                     or  SOURCE/CLASS/image.jpg  (a train split only)
SOURCE/val/CLASS/image.jpg                       (or validation/, or test/)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Final

from pipelines.errors import UserError
from preprocess.listing import IMAGE_SUFFIXES, Entry, Gathered, Location, SplitScan, gather

__all__ = ["IMAGE_SUFFIXES", "Location", "Scan", "SplitScan", "add_source_arguments", "scan", "scan_arguments"]

VAL_NAMES: Final = ("val", "validation", "test")  # the first one that is there


@dataclass(frozen=True)
class Scan:
    """An image folder: `classes` in label order, and the splits `train` and, when there is one, `val`."""

    classes: tuple[str, ...]
    splits: dict[str, SplitScan]


def scan(
    source: str | os.PathLike[str] | None,
    train: str | os.PathLike[str] | None = None,
    val: str | os.PathLike[str] | None = None,
) -> Scan:
    """Lists the images of a folder; reads no image.

    Classes are the class folders of train, sorted by name; files are sorted by name within their class.
    Hidden entries are passed over; entries that are no images, and folders inside class folders, are counted
    and left out.

    Args:
        source: a folder as in the module's docstring; may be None when `train` is given.
        train, val: class-folder trees that take the place of what `source` has.

    Raises:
        UserError: naming the folder, for one that is missing or empty, a class without images, a class that
            val has and train has not, or val images that are not sorted into class folders.
    """
    folders = _find_splits(None if source is None else Path(source))
    if train is not None:
        folders["train"] = Path(train)
    if val is not None:
        folders["val"] = Path(val)
    if "train" not in folders:
        raise UserError("no training images are given; name a folder with --source or --train")
    try:
        splits = {"train": _train_split(folders["train"])}
        classes = splits["train"].classes
        if "val" in folders:
            splits["val"] = _val_split(folders["val"], classes)
    except OSError as error:
        if error.filename is None:  # the temporary files of `preprocess.listing`
            where = f"{gettempdir()}: cannot be written ({error.strerror})"
            raise UserError(f"{where}; set TMPDIR to a folder with room") from None
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return Scan(classes, splits)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is to be converted."""
    add = parser.add_argument
    add("--source", metavar="DIR", help="holds train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg")
    add("--train", metavar="DIR", help="class folders of the train split, instead of SOURCE/train")
    add("--val", metavar="DIR", help="class folders of the val split, instead of SOURCE/val")


def scan_arguments(arguments: argparse.Namespace) -> Scan:
    """Scans what the flags of `add_source_arguments` say."""
    return scan(arguments.source, arguments.train, arguments.val)


def _find_splits(source: Path | None) -> dict[str, Path]:
    if source is None:
        return {}
    _require_folder(source)
    found = next((source / name for name in VAL_NAMES if (source / name).is_dir()), None)
    if (source / "train").is_dir():
        return {"train": source / "train"} | ({} if found is None else {"val": found})
    if found is not None:
        raise UserError(f"{source}: has {found.name}/ but no train/; name the training images with --train")
    return {"train": source}


def _train_split(root: Path) -> SplitScan:
    """The tree of class folders that defines the classes."""
    found = _gather(root)
    if found.folders == ("",):
        raise UserError(
            f"{root}: {len(found.groups):,} images, but no class folders; sort them into {root}/CLASS/ first "
            "(ImageNet's val images come flat: a script such as valprep.sh sorts them)"
        )
    return found.by_folder(sorted(found.folders))


def _val_split(root: Path, classes: tuple[str, ...]) -> SplitScan:
    found = _gather(root)
    if found.folders == ("",):
        raise UserError(
            f"{root}: {len(found.groups):,} images, but no class folders; sort them into {root}/CLASS/ first "
            "(ImageNet's val images come flat: a script such as valprep.sh sorts them)"
        )
    unknown = sorted(set(found.folders) - set(classes))
    if unknown:
        raise UserError(
            f"{root}: {len(unknown)} class folder{'s' * (len(unknown) > 1)} that train does not have, "
            f"first {unknown[0]!r}; give both the same class names"
        )
    return found.by_folder(classes)


def _gather(root: Path) -> Gathered:
    """All images of a folder; at least one."""
    _require_folder(root)
    found = gather(root, _folder_entries(root))
    if not found.folders:
        raise UserError(f"{root}: no class folders with images in it; it needs {root}/CLASS/image.jpg")
    return found


def _folder_entries(root: Path) -> Iterator[Entry | None]:
    """The images in class folders; where there are no folders, those in `root` itself."""
    folders, images, num_others = _list_folder(root)
    yield from [None] * num_others
    yield from (None if folders else Entry("", name) for name in images)
    for folder in folders:
        below, files, num_others = _list_folder(root / folder)
        if not files:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(
                f"{root / folder}: a class folder without images ({len(below)} folders, {num_others} other files); "
                f"images ({suffixes}) belong directly into it: fill it or remove it"
            )
        yield from [None] * (num_others + len(below))
        yield from (Entry(folder, name) for name in files)


def _list_folder(folder: Path) -> tuple[list[str], list[str], int]:
    """(folders, image files, number of other files), sorted by name; hidden entries are passed over."""
    folders, images, others = [], [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                images.append(entry.name)
            else:
                others += 1
    return sorted(folders), sorted(images), others


def _require_folder(folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder")
