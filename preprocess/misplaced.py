"""Recognises sources whose folders or archives are laid out otherwise, and says what they are."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pipelines.errors import UserError
from preprocess.archive import archive_entries
from preprocess.kinds import LABEL_BESIDE, Skipped
from preprocess.listing import Gathered
from preprocess.splits import seeming_splits

__all__ = ["refuse_folder_of_webdatasets", "refuse_splits", "refuse_webdataset"]


def refuse_splits(found: Gathered, root: Path, classes: list[str], *, is_source: bool) -> None:
    """Raises `UserError` where the folders seem to hold class folders, not to be some themselves."""
    deep = sorted(set(classes) - {name for name, below in found.places if not below})
    splits = seeming_splits(classes, deep)
    if is_source and splits:
        first = next((name for name in splits if "train" in name.lower()), splits[0])
        raise UserError(
            f"{root}: {' and '.join(f'{name}/' for name in splits[:2])} seem{'s' * (len(splits) == 1)} to hold class "
            f"folders; name the splits, such as --train {root / first}, and --val; if they are classes: --train {root}"
        )
    if len(classes) == 1 and deep and (is_source or splits or deep[0] == root.name):
        raise UserError(
            f"{root}: all images lie in folders below its only folder, {deep[0]}/; name that in its place: "
            f"{root / deep[0]}" + f" (if it is the only class: --train {root})" * is_source
        )


def refuse_webdataset(found: Gathered) -> None:
    """Raises `UserError` for an archive of images with their labels in files of the same name beside them."""
    flat = len(found.folders) == 1
    for entry in found.left_out:
        num_images, is_cls = len(found.groups), entry.example.endswith(".cls")
        if entry.kind == LABEL_BESIDE and 2 * entry.count > num_images and (flat or is_cls):
            raise _webdataset(found.root, entry.example)


def refuse_folder_of_webdatasets(root: Path) -> None:
    """Raises `UserError` for a folder of WebDataset tars."""
    first = min(root.glob("*.tar"), default=None)
    if first is None or not first.is_file():
        return
    for entry in islice(archive_entries(first), 8):
        if isinstance(entry, Skipped) and entry.kind == LABEL_BESIDE:
            raise _webdataset(first, entry.file)


def _webdataset(path: Path, example: str) -> UserError:
    return UserError(
        f"{path}: a WebDataset tar, in which each image's label lies in a file beside it ({example}); such tars are "
        "not converted yet: unpack their images into CLASS/ folders (a shard set of build_dali.py needs no conversion: "
        "train on its folder)"
    )
