"""Finds the places of the splits of a source: folders, archives, or the container files of each split.

FOLDER/train-00000-of-00294.parquet, FOLDER/data/train-*.parquet          Hugging Face; one file or many
FOLDER/train-000000.tar, FOLDER/imagenet1k-train-0000.tar                 WebDataset; one tar or many
FOLDER/train/0000.parquet, FOLDER/train/0.tar                             the same in folders of the splits

The split of a file is the first word of its name that names one (train, val, valid, validation, test, ...).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sdpnet.pipelines.errors import ShardError, UserError
from sdpnet.pipelines.shards.manifest import MANIFEST_NAME, read_manifest
from sdpnet.preprocess.sources.class_folders import has_images
from sdpnet.preprocess.sources.files.file_kinds import kind_of_folder
from sdpnet.preprocess.sources.splits import IMAGENET_ARCHIVES, find_splits, split_of_name
from sdpnet.preprocess.sources.webdataset import is_webdataset

__all__ = ["Container", "find_places"]

_DATA: Final = "data"  # the folder of the files in a repository of Hugging Face
_NUMBERED: Final = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})\.(?:parquet|tar)", re.IGNORECASE)
_SHARD: Final = re.compile(r"(?:.*[-_.])?\d+\.parquet", re.IGNORECASE)  # in contrast to metadata.parquet
_PARQUET_MARK: Final = b"PAR1"
_PROBED: Final = 3  # so many tars are looked into


@dataclass(frozen=True)
class Container:
    """The container files of a split.

    Attributes:
        kind: what the files are.
        root: their folder.
        files: the files, in the order of their names.
        is_folder: whether the place is the folder, whose other files are then counted, rather than a file.
    """

    kind: Literal["parquet", "tars"]
    root: Path
    files: tuple[Path, ...]
    is_folder: bool = True

    @property
    def pattern(self) -> str:
        """The names of the files: a single name, or their common beginning and end with `*` in between."""
        names = [path.name for path in self.files]
        if len(names) == 1:
            return names[0]
        start = _beginning(names)
        end = _beginning([name[len(start) :][::-1] for name in names])[::-1]
        return f"{start.rstrip('0123456789')}*{end.lstrip('0123456789')}"


def _beginning(names: list[str]) -> str:
    """The characters with which all names begin."""
    first, last = min(names), max(names)
    length = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def find_places(
    source: Path | None, given: dict[str, Path], is_output: Callable[[Path], bool]
) -> dict[str, Path | Container]:
    """Returns the place of each split: that in `given`, or otherwise that found in `source`.

    Folders for which `is_output` is true contain only the output and are ignored.

    Raises:
        UserError: as in `find_splits`; a folder has both container files and class folders, or files of both kinds; it
            has no files of the split; or some of a numbered series of files are missing.
    """
    files = None if source is None or _has_train_folder(source) else _container_files(source, is_output)
    if source is None or files is None:
        places = dict(given) if source is None else find_splits(source, given, is_output)
        return _distinct({split: _container(path, split, is_output) or path for split, path in places.items()})
    by_split = _by_split(files)
    found: dict[str, Path | Container] = {
        split: _container(path, split, is_output) or path for split, path in given.items()
    }
    for split in ("train", "val"):
        if split not in found and (split == "train" or "val" in by_split):
            found[split] = _chosen(source, files, split, is_named=False)
    return _distinct({split: found[split] for split in ("train", "val") if split in found})


def _distinct(places: dict[str, Path | Container]) -> dict[str, Path | Container]:
    """Returns the places. Raises `UserError` if train and val are the same files."""
    train, val = places.get("train"), places.get("val")
    if isinstance(train, Container) and isinstance(val, Container):
        both = {os.path.realpath(file) for file in train.files} & {os.path.realpath(file) for file in val.files}
        if both:
            raise UserError(
                f"{min(both)}: is in both the train and the val split, so the model would be evaluated on its training "
                "images; name other files with --val"
            )
    return places


def _has_train_folder(source: Path) -> bool:
    """Whether a folder has a folder of the train split in it."""
    if not source.is_dir():
        return False
    with os.scandir(source) as entries:
        return any(split_of_name(entry.name, whole=True) == "train" and entry.is_dir() for entry in entries)


def _container(path: Path, split: str, is_output: Callable[[Path], bool]) -> Container | None:
    """The container files of a split at a place; None if it is a folder or an archive of another kind."""
    files = _container_files(path, is_output)
    return None if files is None else _chosen(path, files, split, is_named=True)


def _container_files(path: Path, is_output: Callable[[Path], bool]) -> Container | None:
    """All container files at a path; None if there are none, or if the folder has class folders instead."""
    if path.is_file():
        if _is_parquet(path):
            return Container("parquet", path.parent, (path,), is_folder=False)
        return Container("tars", path.parent, (path,), is_folder=False) if is_webdataset(path) else None
    if not path.is_dir():
        return None
    for folder in (path, path / _DATA):
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        files = [folder / name for name in names if not name.startswith(".") and (folder / name).is_file()]
        parquet = tuple(file for file in files if file.suffix.lower() == ".parquet")
        tars = tuple(file for file in files if file.suffix.lower() == ".tar" and file.name not in IMAGENET_ARCHIVES)
        if not any(is_webdataset(tar) for tar in tars[:_PROBED]):
            tars = ()
        if not parquet and not tars:
            continue
        below = next((name for name in names if _is_class_folder(folder / name, is_output)), None)
        if below is not None:
            _refuse_mixed(folder, below, parquet, tars)
            return None
        if parquet and tars:
            raise UserError(
                f"{folder}: has both Parquet files ({parquet[0].name}) and WebDataset tars ({tars[0].name}); name the "
                "right ones with --train and --val"
            )
        return Container("parquet", folder, parquet) if parquet else Container("tars", folder, tars)
    return None


def _is_parquet(path: Path) -> bool:
    if path.suffix.lower() == ".parquet":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_PARQUET_MARK)) == _PARQUET_MARK
    except OSError:
        return False


def _is_class_folder(path: Path, is_output: Callable[[Path], bool]) -> bool:
    return path.is_dir() and not kind_of_folder(path.name) and not is_output(path) and has_images(path)


def _refuse_mixed(folder: Path, below: str, parquet: tuple[Path, ...], tars: tuple[Path, ...]) -> None:
    """Raises `UserError` if container files beside class folders seem to have images.

    The tars of a shard set and files such as metadata.parquet are ordinary other files.
    """
    deliberate = [file for file in parquet if split_of_name(file.stem) or _SHARD.fullmatch(file.name)]
    if tars and not _is_shard_set(folder):
        deliberate += tars
    if deliberate:
        raise UserError(
            f"{folder}: has both class folders with images ({below}/) and {deliberate[0].name}; move one of them out, "
            f"or name the files with --train, such as --train {deliberate[0]}"
        )


def _is_shard_set(folder: Path) -> bool:
    if not (folder / MANIFEST_NAME).is_file():
        return False
    try:
        read_manifest(str(folder))
    except ShardError:
        return False
    return True


def _by_split(container: Container) -> dict[str, list[Path]]:
    """The files of a container by their split; "" for files whose names have none."""
    found: dict[str, list[Path]] = {}
    for file in container.files:
        found.setdefault(split_of_name(file.stem) or "", []).append(file)
    return found


def _chosen(path: Path, container: Container, split: str, *, is_named: bool) -> Container:
    """The files of one split of a container. `is_named`: whether the user or the name of the folder says the split."""
    if not container.is_folder:
        return container
    found = _by_split(container)
    # Files of another split are taken only if their place says that they are meant.
    alone = next(iter(found.values())) if len(found) == 1 and (is_named or "" in found) else []
    files = found.get(split) or alone
    if not files:
        names = ", ".join(sorted(files[0].name for files in found.values())[:3])
        raise UserError(f"{path}: has {names}, but no files of the {split} split; name their folder with --{split}")
    _require_complete(files)
    return Container(container.kind, container.root, tuple(files))


def _require_complete(files: list[Path]) -> None:
    """Raises `UserError` if a file of a series such as train-00000-of-00294.parquet is missing."""
    series: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            series.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (start, count), numbers in series.items():
        if len(numbers) < count:
            width = len(_NUMBERED.fullmatch(files[0].name)[3])  # type: ignore[index]
            missing = next(number for number in range(count) if number not in numbers)
            raise UserError(
                f"{files[0].parent}: {count - len(numbers):,} of {count:,} files are missing, first "
                f"{start}-{missing:0{width}}-of-{count:0{width}}{files[0].suffix}; download them, or, to convert only "
                "these, rename them without '-of-'"
            )
