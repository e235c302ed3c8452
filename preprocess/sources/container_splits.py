"""Lists the splits of a source whose images lie in Parquet files or WebDataset tars."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME, read_manifest
from sdpnet.pipelines.shards.origin import LeftOut
from sdpnet.preprocess.sources.class_folders import Exclusions, count_files, list_folder
from sdpnet.preprocess.sources.containers.labels import ClassLabels, checked_names
from sdpnet.preprocess.sources.containers.split import Addresses, ContainerSplit, RowAddresses
from sdpnet.preprocess.sources.files.file_kinds import Skipped
from sdpnet.preprocess.sources.parquet.listing import list_parquet
from sdpnet.preprocess.sources.places import Container
from sdpnet.preprocess.sources.splits import split_of_name
from sdpnet.preprocess.sources.synsets import read_text
from sdpnet.preprocess.sources.webdataset import list_tars

__all__ = ["ImageColumns", "ListedContainer", "list_container", "other_files"]

_NAMES_FILES: Final = ("classes.txt", "classnames.txt", "class_names.txt", "synsets.txt")  # one class in each line
_INFO_FILES: Final = ("_info.json", "info.json")  # of timm's data sets
_INFO_FIELDS: Final = ("class_names", "classnames", "classes", "label_names")


class ImageColumns(NamedTuple):
    """The columns of Parquet files that the user named; None to find them."""

    image: str | None = None
    label: str | None = None


class ListedContainer(NamedTuple):
    """The images of one split.

    Attributes:
        container: its files.
        labels: the labels of the images.
        addresses: the places of the images.
        left_out: the other files in the tars, by kind.
        names_file: the file beside the container files from which the names of the classes were read; None otherwise.
        columns: the columns of Parquet files in parentheses, for messages; "" for tars.
    """

    container: Container
    labels: ClassLabels
    addresses: Addresses
    left_out: tuple[LeftOut, ...]
    names_file: Path | None
    columns: str

    def split(self, classes: tuple[str, ...]) -> ContainerSplit:
        """The split, with labels that are indices into the classes of the train split."""
        labels = self.labels.among(classes)
        return ContainerSplit(self.container.root, classes, labels, self.left_out, self.addresses)


def list_container(container: Container, columns: ImageColumns) -> ListedContainer:
    """Lists the images of one split.

    The names of classes are those in the files. For integers without names, they are read from a file beside the
    container files, or beside their folder if that has the name of a split: `classes.txt` with a class in each line,
    `_info.json` of timm's data sets, or the manifest of a shard set.

    Raises:
        UserError: a file is damaged or its labels are of no use. The message names the file.
    """
    if container.kind == "parquet":
        rows = list_parquet(container.files, *columns)
        known = rows.texts if rows.columns.is_text else rows.columns.names
        if known is not None:
            names_file = None
            names: tuple[str, ...] | None = checked_names(known, f"{container.files[0]}: {rows.columns.label!r}")
        else:
            names_file, names = _names_beside(container)
        files = tuple(path.name for path in container.files)
        arrays = rows.groups, rows.starts, rows.file_starts, rows.sizes
        addresses: Addresses = RowAddresses(container.root, files, rows.footers, rows.columns.image_bytes, *arrays)
        where = str(container.root / container.pattern)
        shown = f" ({rows.columns.image}, {rows.columns.label})"
        return ListedContainer(container, ClassLabels(where, rows.labels, names), addresses, (), names_file, shown)
    names_file, names = _names_beside(container)
    labels, addresses, left_out = list_tars(container.root, container.files, names)
    return ListedContainer(container, labels, addresses, left_out, names_file if names else None, "")


def other_files(containers: Iterable[ListedContainer], exclusions: Exclusions) -> Iterator[tuple[Path, Skipped]]:
    """Yields the files beside the container files of all splits and below their folders, each with that folder."""
    found = list(containers)
    chosen = {path for listed in found for path in listed.container.files}
    for root in dict.fromkeys(listed.container.root for listed in found if listed.container.is_folder):
        others = list_folder(str(root), "", exclusions)
        yield from ((root, skipped) for skipped in others.skipped if root / skipped.file not in chosen)
        yield from (
            (root, Skipped("images beside the container files, in none of them", name)) for name in others.images
        )
        for name in others.folders:
            yield root, count_files(str(root / name), name, f"files of {name}/, which is no split", exclusions)


def _names_beside(container: Container) -> tuple[Path | None, tuple[str, ...] | None]:
    """The file with the names of the classes, and the names; (None, None) if there is none."""
    folders = [container.root]
    if split_of_name(container.root.name, whole=True) or container.root.name == "data":
        folders.append(container.root.parent)
    for folder in folders:
        for name in _NAMES_FILES:
            path = folder / name
            if path.is_file():
                lines = [line.strip() for line in read_text(path).rstrip("\n").split("\n")]
                return path, checked_names(lines, path)
        for name in _INFO_FILES:
            path = folder / name
            if path.is_file() and (names := _from_info(path)) is not None:
                return path, checked_names(names, path)
        if container.kind == "tars" and (folder / MANIFEST_NAME).is_file():
            try:
                return folder / MANIFEST_NAME, read_manifest(str(folder)).classes
            except ShardError:
                continue  # a manifest.json of another program
    return None, None


def _from_info(path: Path) -> list[Any] | None:
    """The names of the classes in an `_info.json`, if it has any."""
    try:
        info = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no JSON; download it again, or remove it") from None
    fields = (info.get(field) for field in _INFO_FIELDS) if isinstance(info, dict) else ()
    return next((names for names in fields if isinstance(names, list) and names), None)
