"""Lists an image folder: which classes there are, and which image belongs to which, in a fixed order.

SOURCE/train/CLASS/image.jpg                     or  SOURCE/CLASS/image.jpg  (a train split only)
SOURCE/val/CLASS/image.jpg                       (or validation/, or test/)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from pipelines.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "Scan", "SplitScan", "scan"]

# torchvision.datasets.folder.IMG_EXTENSIONS
IMAGE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
VAL_NAMES: Final = ("val", "validation", "test")  # the first one that is there


@dataclass(frozen=True, eq=False)
class SplitScan:
    """The images of one split, ordered by class and then by file name.

    Attributes:
        root: the split's folder.
        classes: the data set's class names; `classes[label]` is also the class folder's name.
        labels: int32 (num_images,).
        num_ignored: entries that are no images (hidden ones are not counted).

    File names are held as one packed string: about 30 bytes an image, 0.4 GB for 14 million.
    """

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    num_ignored: int
    _names: bytes = field(repr=False)
    _ends: np.ndarray = field(repr=False)  # int64 (num_images,): where each file name ends in _names

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def relative_path(self, index: int) -> str:
        """`CLASS/FILE` of image `index`, below `root`."""
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        name = os.fsdecode(self._names[start : int(self._ends[index])])
        return f"{self.classes[self.labels[index]]}/{name}"

    def path(self, index: int) -> str:
        """Where image `index` lies."""
        return os.path.join(self.root, self.relative_path(index))


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
        train_split = _read_split(folders["train"], None)
        splits = {"train": train_split}
        if "val" in folders:
            splits["val"] = _read_split(folders["val"], train_split.classes)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return Scan(train_split.classes, splits)


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


def _read_split(root: Path, classes: tuple[str, ...] | None) -> SplitScan:
    """Lists one tree of class folders. `classes` are the ones allowed; None: this tree defines them."""
    _require_folder(root)
    folders, images, num_ignored = _list_folder(root)
    if not folders and not images:
        raise UserError(f"{root}: no class folders with images in it; it needs {root}/CLASS/image.jpg")
    if not folders:
        raise UserError(
            f"{root}: {len(images):,} images, but no class folders; sort them into {root}/CLASS/ first "
            "(ImageNet's val images come flat: a script such as valprep.sh sorts them)"
        )
    known = {name: label for label, name in enumerate(folders if classes is None else classes)}
    unknown = [name for name in folders if name not in known]
    if unknown:
        raise UserError(
            f"{root}: {len(unknown)} class folder{'s' * (len(unknown) > 1)} that train does not have, "
            f"first {unknown[0]!r}; give both the same class names"
        )
    packed = bytearray()
    lengths, counts = [], []
    num_ignored += len(images)
    for name in folders:
        below, files, others = _list_folder(root / name)
        if not files:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(
                f"{root / name}: a class folder without images ({len(below)} folders, {others} other files); "
                f"images ({suffixes}) belong directly into it: fill it or remove it"
            )
        encoded = [os.fsencode(file) for file in files]
        packed += b"".join(encoded)
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        counts.append(len(files))
        num_ignored += others + len(below)
    labels = np.repeat(np.array([known[name] for name in folders], np.int32), counts)
    ends = np.cumsum(np.concatenate(lengths))
    return SplitScan(root, tuple(known), labels, num_ignored, bytes(packed), ends)


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
