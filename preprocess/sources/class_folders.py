"""Walks a folder of class folders: lists the images, at any depth, and all other files by their kind.

As in torchvision's ImageFolder, symbolic links are followed, and the class of an image is the first folder below the
root.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.images.kinds import HEAD_BYTES
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME, QUARANTINE_NAME, read_manifest
from sdpnet.preprocess.sources.files.file_kinds import (
    BESIDE_CLASSES,
    READ_FOR_LABELS,
    SHARD_SETS,
    Skipped,
    has_image_suffix,
    is_image,
    kind_by_name,
    kind_by_suffix,
    kind_of_folder,
)
from sdpnet.preprocess.sources.files.links import LOOPS, NOWHERE, is_file, is_folder, links_to_ancestor
from sdpnet.preprocess.sources.listing import Entry

__all__ = [
    "Exclusions",
    "count_files",
    "folder_entries",
    "has_images",
    "has_only_excluded",
    "list_folder",
    "refuse_output_among_images",
]

_DETECTION: Final = ("labels", "annotations")  # folders of object-detection data sets, beside images/
_MANIFEST_BYTES: Final = 1 << 26  # a larger manifest.json belongs to another program
_PAGE_NAME: Final = "report.html"  # written by `sdpnet describe`


@dataclass(frozen=True)
class Exclusions:
    """Folders and files that a walk neither enters nor counts.

    Attributes:
        folders: the device and inode of each folder, such as the one that the shard set is written to.
        above: the device and inode of each parent folder of one of them.
        labels: the real paths of files that are read for the labels.
    """

    folders: frozenset[tuple[int, int]] = frozenset()
    above: frozenset[tuple[int, int]] = frozenset()
    labels: frozenset[str] = frozenset()

    @staticmethod
    def of(folders: Iterable[Path], labels: Iterable[Path]) -> Exclusions:
        """Returns the exclusions for these folders, if they exist, and label files."""
        existing = [folder.resolve() for folder in folders if folder.is_dir()]
        above = {_identity(str(parent)) for folder in existing for parent in folder.parents}
        return Exclusions(
            frozenset(_identity(str(folder)) for folder in existing),
            frozenset(above),
            frozenset(os.path.realpath(path) for path in labels),
        )

    def has(self, folder: str) -> bool:
        """Whether this folder is excluded."""
        return bool(self.folders) and _identity(folder) in self.folders

    def is_above(self, folder: str) -> bool:
        """Whether an excluded folder lies below this folder."""
        return bool(self.above) and _identity(folder) in self.above


class Listed(NamedTuple):
    """The contents of one folder, sorted by name: folders to walk, images, and all other files by kind."""

    folders: list[str]
    images: list[str]
    skipped: list[Skipped]


def folder_entries(root: Path, exclusions: Exclusions) -> Iterator[Entry | Skipped]:
    """Yields the images in class folders and below them. If no folder has images, yields those in `root` itself.

    Links to folders are followed, except links to a folder that contains the link: its files are listed already.

    Raises:
        UserError: a class folder has no images.
        OSError: a folder cannot be read.
    """
    listed = list_folder(str(root), "", exclusions)
    yield from listed.skipped
    folders = []
    for folder in listed.folders:
        if has_only_excluded(root / folder, exclusions):
            yield from _all_skipped(root, folder, exclusions)
        else:
            folders.append(folder)
    if listed.images and not any(_has_images(root, folder, exclusions) for folder in folders):
        yield from (Entry("", name) for name in listed.images)
        for folder in folders:
            yield from _all_skipped(root, folder, exclusions)
        return
    yield from (Skipped(BESIDE_CLASSES, name) for name in listed.images)
    for folder in folders:
        others: list[Skipped] = []  # the files before the first image, for the message
        num_images = 0
        for entry in _walk(root, folder, exclusions):
            if isinstance(entry, Entry):
                num_images += 1
            elif not num_images:
                others.append(entry)
            yield entry
        if not num_images and not (others and all(skipped.kind == SHARD_SETS for skipped in others)):
            raise _without_images(root, folder, others)


def has_images(folder: Path) -> bool:
    """Whether a folder has at least one image in it or below it."""
    return _has_images(folder.parent, folder.name, Exclusions())


def refuse_output_among_images(out: Path, roots: list[Path]) -> None:
    """Raises `UserError` if the shard set would be written to a folder with images below one of `roots`.

    The folder of the shard set is not searched, so that its images would be missing in the shard set without a message.
    """
    resolved = out.resolve()
    if out.is_dir() and any(root.resolve() in resolved.parents for root in roots) and has_images(out):
        raise UserError(f"{out}: a folder of the source that has images in it or below it; choose another --out")


def has_only_excluded(folder: Path, exclusions: Exclusions) -> bool:
    """Whether a folder is excluded, or contains an excluded folder and no image beside it."""
    if exclusions.has(str(folder)):
        return True
    return exclusions.is_above(str(folder)) and not _has_images(folder.parent, folder.name, exclusions)


def list_folder(path: str, below: str, exclusions: Exclusions) -> Listed:
    """Lists the folder `path`. The names of skipped files begin with `below`, the folder's path below the root."""
    folders, images, skipped = [], [], []
    of_shard_set = _files_of_shard_set(path)
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if is_folder(entry):
                if exclusions.has(entry.path):
                    continue
                if kind := kind_of_folder(name):
                    skipped.append(count_files(entry.path, below + name, kind, exclusions))
                elif entry.is_symlink() and links_to_ancestor(entry.path):
                    skipped.append(Skipped(LOOPS, below + name))
                else:
                    folders.append(name)
                continue
            kind = SHARD_SETS if name in of_shard_set else _kind_of_file(entry, exclusions)
            if kind is None:
                images.append(name)
            else:
                skipped.append(Skipped(kind, below + name))
    return Listed(sorted(folders), sorted(images), sorted(s for s in skipped if s.number))


def count_files(path: str, below: str, kind: str, exclusions: Exclusions) -> Skipped:
    """Counts all files below the folder `path`, whose path below the root is `below`. Links are not followed."""
    count, example = 0, ""
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not exclusions.has(os.path.join(folder, name)))
        count += len(files)
        if files and not example:
            example = os.path.join(below, os.path.relpath(os.path.join(folder, min(files)), path))
    return Skipped(kind, example or below, count)


def _walk(root: Path, top: str, exclusions: Exclusions) -> Iterator[Entry | Skipped]:
    """Yields all files in and below the folder `top` of `root`. Links are followed."""
    todo = [top]
    while todo:
        below = todo.pop()
        listed = list_folder(os.path.join(root, below), f"{below}/", exclusions)
        yield from (Entry(below, name) for name in listed.images)
        yield from listed.skipped
        todo += [f"{below}/{name}" for name in reversed(listed.folders)]


def _has_images(root: Path, folder: str, exclusions: Exclusions) -> bool:
    return any(isinstance(entry, Entry) for entry in _walk(root, folder, exclusions))


def _all_skipped(root: Path, folder: str, exclusions: Exclusions) -> Iterator[Skipped]:
    return (entry for entry in _walk(root, folder, exclusions) if isinstance(entry, Skipped))


def _kind_of_file(entry: os.DirEntry[str], exclusions: Exclusions) -> str | None:
    """The kind of a file; None for an image. Opens the file only if its name does not tell its kind."""
    name = entry.name
    if kind := kind_by_name(name):
        return kind
    by_suffix = has_image_suffix(name)
    if not is_file(entry):
        if entry.is_symlink() and not os.path.exists(entry.path):
            return None if by_suffix else NOWHERE
        return "pipes, sockets and devices"
    if by_suffix:
        return None
    if exclusions.labels and os.path.realpath(entry.path) in exclusions.labels:
        return READ_FOR_LABELS
    try:
        with open(entry.path, "rb", buffering=0) as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return "files of unknown kind that cannot be read"
    return None if is_image(head) else kind_by_suffix(name, len(head))


def _files_of_shard_set(folder: str) -> frozenset[str]:
    """The names of the files of a shard set in this folder; empty if there is none. Other files may lie beside them."""
    path = os.path.join(folder, MANIFEST_NAME)
    if not os.path.isfile(path) or os.path.getsize(path) > _MANIFEST_BYTES:
        return frozenset()
    try:
        manifest = read_manifest(folder)
    except ShardError:  # a manifest.json of another program
        return frozenset()
    files = [file for split in manifest.splits.values() for file in split.files]
    beside = (MANIFEST_NAME, QUARANTINE_NAME, _PAGE_NAME)
    return frozenset([*beside, *(file.name for file in files), *(name for file in files for name in file.sidecars)])


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _without_images(root: Path, folder: str, others: list[Skipped]) -> UserError:
    holds = f"it holds files such as {others[0].file}" if others else "it is empty"
    remedy = "fill it or remove it"
    if folder.lower() in _DETECTION:
        remedy = "a data set for object detection must be sorted into class folders first"
    containers = [Path(other.file) for other in others if other.file.lower().endswith((".parquet", ".tar"))]
    if containers:
        remedy += f"; if its files hold the images, name their folder: --train {root / containers[0].parent}"
    return UserError(f"{root / folder}: a class folder without images in it or below it ({holds}); {remedy}")
