"""Recognises sources with an unexpected layout of folders or archives, and explains what they are."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from sdpnet.pipelines.errors import UserError
from sdpnet.preprocess.sources.archive import archive_entries
from sdpnet.preprocess.sources.class_folders import has_images
from sdpnet.preprocess.sources.files.file_kinds import LABEL_BESIDE, Skipped
from sdpnet.preprocess.sources.listing import Gathered
from sdpnet.preprocess.sources.splits import is_name_of_split, likely_splits

__all__ = ["refuse_folder_of_webdatasets", "refuse_output_among_images", "refuse_splits", "refuse_webdataset"]


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


def refuse_output_among_images(out: Path, roots: list[Path]) -> None:
    """Raises `UserError` if the shard set would be written to a folder with images below one of `roots`.

    The folder of the shard set is not searched, so that its images would be missing in the shard set without a message.
    """
    resolved = out.resolve()
    if out.is_dir() and any(root.resolve() in resolved.parents for root in roots) and has_images(out):
        raise UserError(f"{out}: a folder of the source that has images in it or below it; choose another --out")


def refuse_webdataset(found: Gathered) -> None:
    """Raises `UserError` for an archive whose images have their labels in files of the same name beside them."""
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
