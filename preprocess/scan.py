"""Lists an image data set: which classes there are, and which image belongs to which, in a fixed order.

SOURCE/train/CLASS/image.jpg        or ILSVRC2012_img_train.tar, or SOURCE/CLASS/image.jpg (a train split only)
SOURCE/val/CLASS/image.jpg          or validation/, or ILSVRC2012_img_val.tar, or test/
SOURCE/val/image.jpg                with the labels in a file beside it

SOURCE, and what is named for a split in its place, may be a tar archive too (`preprocess.archive`).
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
from preprocess.archive import archive_entries
from preprocess.labels import read_labels
from preprocess.listing import IMAGE_SUFFIXES, Entry, Gathered, SplitScan, gather
from preprocess.location import Location
from preprocess.synsets import DEVKIT_NAME, GROUND_TRUTH_NAME

__all__ = ["IMAGE_SUFFIXES", "Location", "Scan", "SplitScan", "add_source_arguments", "scan", "scan_arguments"]

TRAIN_NAMES: Final = ("train", "ILSVRC2012_img_train.tar")
VAL_NAMES: Final = ("val", "validation", "ILSVRC2012_img_val.tar", "test")  # the first one that is there
LABELS_NAMES: Final = ("val.txt", "LOC_val_solution.csv", GROUND_TRUTH_NAME)


@dataclass(frozen=True)
class Scan:
    """An image data set: `classes` in label order, and the splits `train` and, when there is one, `val`."""

    classes: tuple[str, ...]
    splits: dict[str, SplitScan]


def scan(
    source: str | os.PathLike[str] | None,
    train: str | os.PathLike[str] | None = None,
    val: str | os.PathLike[str] | None = None,
    val_labels: str | os.PathLike[str] | None = None,
    synsets: str | os.PathLike[str] | None = None,
) -> Scan:
    """Lists the images of folders and archives; reads no image.

    Classes are the class folders of train, sorted by name; files are sorted by name within their class. So a folder
    and an archive of the same images give the same list. Entries that are no images, and folders inside class folders,
    are counted and left out; so are hidden entries, which are not counted in folders.

    Args:
        source: a folder as in the module's docstring, or an archive of the train split; may be None when `train` is
            given.
        train, val: folders or archives that take the place of what `source` has.
        val_labels: for val images without class folders; see `preprocess.labels`. Default: what lies beside them
            under a usual name.
        synsets: what the IDs in `val_labels` mean; see `preprocess.synsets`.

    Raises:
        UserError: naming the folder or archive, for one that is missing, damaged or empty, a class without images, a
            class that val has and train has not, or val images without class folders or labels.
    """
    places = _find_splits(None if source is None else Path(source))
    if train is not None:
        places["train"] = Path(train)
    if val is not None:
        places["val"] = Path(val)
    if "train" not in places:
        raise UserError("no training images are given; name a folder or archive with --source or --train")
    if "val" not in places and val_labels is not None:
        raise UserError(f"{val_labels}: labels, but there are no val images; name them with --val")
    try:
        splits = {"train": _train_split(places["train"])}
        classes = splits["train"].classes
        if "val" in places:
            labels, ids = (None if path is None else Path(path) for path in (val_labels, synsets))
            splits["val"] = _val_split(places["val"], classes, labels, ids)
    except OSError as error:
        if error.filename is None:  # the temporary files of `preprocess.listing`
            where = f"{gettempdir()}: cannot be written ({error.strerror})"
            raise UserError(f"{where}; set TMPDIR to a folder with room") from None
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return Scan(classes, splits)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is to be converted."""
    add = parser.add_argument
    source = "holds train/CLASS/*.jpg and val/CLASS/*.jpg, or ImageNet's tars, or CLASS/*.jpg"
    add("--source", metavar="PATH", help=source)
    add("--train", metavar="PATH", help="folder or tar of the train split, instead of what SOURCE has")
    add("--val", metavar="PATH", help="folder or tar of the val split, instead of what SOURCE has")
    labels = "of val images without class folders: FILE LABEL lines, CSV, or ImageNet's ground truth or devkit"
    add("--val-labels", metavar="FILE", help=labels)
    add("--synsets", metavar="FILE", help="meta.mat, map_clsloc.txt or the like: the classes of ImageNet's IDs")


def scan_arguments(arguments: argparse.Namespace) -> Scan:
    """Scans what the flags of `add_source_arguments` say."""
    return scan(arguments.source, arguments.train, arguments.val, arguments.val_labels, arguments.synsets)


def _find_splits(source: Path | None) -> dict[str, Path]:
    if source is None:
        return {}
    if not source.is_dir():
        return {"train": source}
    train, val = (
        next((source / name for name in names if (source / name).is_dir() or _is_tar(source / name)), None)
        for names in (TRAIN_NAMES, VAL_NAMES)
    )
    if train is not None:
        return {"train": train} | ({} if val is None else {"val": val})
    if val is not None:
        name = val.name if _is_tar(val) else f"{val.name}/"
        raise UserError(f"{source}: has {name} but no train/; name the training images with --train")
    return {"train": source}


def _is_tar(path: Path) -> bool:
    return path.suffix == ".tar" and path.is_file()


def _train_split(root: Path) -> SplitScan:
    """The class folders that define the classes."""
    found = _gather(root)
    if found.folders == ("",):
        raise UserError(
            f"{root}: {len(found.groups):,} images, but no class folders; sort them into {root}/CLASS/ first "
            "(ImageNet's val images, which come without: name them with --val, and their labels with --val-labels)"
        )
    return found.by_folder(sorted(found.folders))


def _val_split(root: Path, classes: tuple[str, ...], labels: Path | None, synsets: Path | None) -> SplitScan:
    found = _gather(root)
    # An archive of images without class folders may have them all in one folder, such as val/.
    if found.folders == ("",) or (found.is_archive and len(found.folders) == 1 and found.folders[0] not in classes):
        if labels is None:
            labels = _labels_beside(root, len(found.groups), synsets)
        names = found.file_names()
        return found.by_labels(classes, read_labels(labels, root, names, classes, synsets))
    unknown = sorted(set(found.folders) - set(classes))
    if unknown:
        raise UserError(
            f"{root}: {len(unknown)} class folder{'s' * (len(unknown) > 1)} that train does not have, "
            f"first {unknown[0]!r}; give both the same class names"
        )
    if labels is not None:
        raise UserError(f"{root}: its images are in class folders, which say their labels; leave --val-labels out")
    return found.by_folder(classes)


def _labels_beside(root: Path, num_images: int, synsets: Path | None) -> Path:
    """The one labels file of a usual name in the folder that holds `root`."""
    folder = root.parent
    found = [folder / name for name in LABELS_NAMES if (folder / name).is_file()]
    devkit = folder / DEVKIT_NAME
    if devkit.is_file() and (not found or (found == [folder / GROUND_TRUTH_NAME] and synsets is None)):
        found = [devkit]  # has both the ground truth and what its IDs mean
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{root}: {names} beside it may have the labels; choose one with --val-labels")
    if not found:
        raise UserError(
            f"{root}: {num_images:,} images, but no class folders and no labels; sort them into {root}/CLASS/, or give "
            f"--val-labels FILE: {DEVKIT_NAME}, LOC_val_solution.csv, or a text file with 'FILE CLASS' in each line"
        )
    return found[0]


def _gather(root: Path) -> Gathered:
    """All images of a folder or archive; at least one."""
    if not root.exists():
        raise UserError(f"{root}: no such folder or archive")
    is_archive = root.is_file()
    if not is_archive and not root.is_dir():
        raise UserError(f"{root}: not a folder, nor a tar archive")
    found = gather(root, archive_entries(root) if is_archive else _folder_entries(root), is_archive=is_archive)
    if not found.folders:
        needs = "CLASS/image.jpg or CLASS.tar entries" if is_archive else f"{root}/CLASS/image.jpg"
        raise UserError(f"{root}: no class folders with images in it; it needs {needs}")
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
