"""Lists an image data set: its classes, and the images of each class, in a fixed order.

SOURCE/train/CLASS/image.jpg        or ILSVRC2012_img_train.tar, or SOURCE/CLASS/image.jpg (a train split only)
SOURCE/val/CLASS/image.jpg          or ILSVRC2012_img_val.tar; see `sdpnet.preprocess.sources.splits` for other names
SOURCE/val/image.jpg                with the labels in a file beside it

Images may lie in folders below their class folder. SOURCE and each split may also be a tar archive
(`sdpnet.preprocess.sources.archive`). All other files are counted by their kind
(`sdpnet.preprocess.sources.files.file_kinds`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Final

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.shards.manifest import UNFINISHED_NAME
from sdpnet.pipelines.shards.origin import Origin
from sdpnet.preprocess.sources.archive import archive_entries
from sdpnet.preprocess.sources.class_folders import (
    Exclusions,
    count_files,
    folder_entries,
    has_only_excluded,
    list_folder,
    refuse_output_among_images,
)
from sdpnet.preprocess.sources.container_splits import ImageColumns, list_container, other_files
from sdpnet.preprocess.sources.files.file_kinds import BESIDE_CLASSES, Skipped, Tally
from sdpnet.preprocess.sources.files.location import Location
from sdpnet.preprocess.sources.labels import read_labels
from sdpnet.preprocess.sources.listing import Gathered, SplitImages, SplitScan, gather
from sdpnet.preprocess.sources.places import Container, find_places, is_same, path_of, place_name
from sdpnet.preprocess.sources.splits import refuse_splits
from sdpnet.preprocess.sources.synsets import DEVKIT_NAME, GROUND_TRUTH_NAME
from sdpnet.preprocess.sources.val_draw import ValDraw, draw_val

__all__ = ["Location", "Scan", "SplitScan", "scan", "scan_arguments"]

LABELS_NAMES: Final = ("val.txt", "LOC_val_solution.csv", GROUND_TRUTH_NAME)


@dataclass(frozen=True)
class Scan:
    """An image data set.

    Attributes:
        classes: class names in label order.
        splits: the split `train`, and `val` if there is one.
        origin: the names of the folders or archives, and the files that are not converted.
    """

    classes: tuple[str, ...]
    splits: dict[str, SplitImages]
    origin: Origin


def scan(
    source: str | os.PathLike[str] | None,
    train: str | os.PathLike[str] | None = None,
    val: str | os.PathLike[str] | None = None,
    val_labels: str | os.PathLike[str] | None = None,
    synsets: str | os.PathLike[str] | None = None,
    *,
    val_draw: ValDraw | None = None,
    out: str | os.PathLike[str] | None = None,
    columns: ImageColumns = ImageColumns(),  # noqa: B008 - a tuple
) -> Scan:
    """Lists the images of folders, archives and container files. Files with the suffix of an image are not opened.

    The classes are the class folders of train, sorted by name. Within a class, images are sorted by folder and name, as
    in torchvision's ImageFolder, so that a folder and an archive of the same images give the same list. All other files
    below the source are in `left_out` of the origin.

    Args:
        source: a folder as in the module's docstring, or an archive of the train split. It may be None if `train` is
            given.
        train, val: folders or archives that replace those of `source`.
        val_labels: the labels of val images without class folders; see `sdpnet.preprocess.sources.labels`. The default
            is a file with a usual name beside the images.
        synsets: the classes of the IDs in `val_labels`; see `sdpnet.preprocess.sources.synsets`.
        val_draw: draws the val split from the train images.
        out: the folder of the shard set. It may lie in the source and is not searched for images.
        columns: the columns of Parquet files.

    Raises:
        UserError: a folder or archive is missing, damaged, empty or ambiguous; a class has no images; val has a class
            that train does not have; val images have neither class folders nor labels; or a val split is both drawn
            and given. The message names the folder or archive.
    """
    given = {name: Path(path) for name, path in (("train", train), ("val", val)) if path is not None}
    try:
        output = Exclusions.of([] if out is None else [Path(out)], [])
        if out is not None:
            refuse_output_among_images(Path(out), [Path(path) for path in (source, train, val) if path is not None])
        root = None if source is None else Path(source)
        places = find_places(root, given, lambda folder: has_only_excluded(folder, output))
        if "train" not in places:
            raise UserError("no training images are given; name a folder or archive with --source or --train")
        if "val" not in places and val_labels is not None:
            raise UserError(f"{val_labels}: labels, but there are no val images; name them with --val")
        if columns != ImageColumns() and not any(_is_parquet(place) for place in places.values()):
            raise UserError("--image-column, --label-column: the source has no Parquet files; omit these flags")
        if "val" in places and val_draw is not None:
            raise UserError(
                f"{path_of(places['val'])}: is already the val split; omit --val-share, or remove this folder"
            )
        labels, ids = (None if path is None else Path(path) for path in (val_labels, synsets))
        is_source = "train" not in given and source is not None and places["train"] == Path(source)
        is_given = "train" in given
        return _scan(root, places, labels, ids, val_draw, out, columns, is_source=is_source, is_given=is_given)
    except OSError as error:
        if error.filename is None:  # from a temporary file of `sdpnet.preprocess.sources.listing`
            where = f"{gettempdir()}: cannot be written ({error.strerror})"
            raise UserError(f"{where}; set TMPDIR to a folder with room") from None
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def scan_arguments(arguments: argparse.Namespace) -> Scan:
    """Scans the images given by the flags of `sdpnet.preprocess.flags.sources`. `arguments.out` is the shard set."""
    draw = None
    if arguments.val_share is not None:
        draw = ValDraw(arguments.val_share, arguments.val_seed or 0)
    elif arguments.val_seed is not None:
        raise UserError(f"--val-seed {arguments.val_seed}: --val-share is not given; add it, or omit --val-seed")
    paths = (arguments.source, arguments.train, arguments.val, arguments.val_labels, arguments.synsets)
    columns = ImageColumns(arguments.image_column, arguments.label_column)
    return scan(*paths, val_draw=draw, out=getattr(arguments, "out", None), columns=columns)


def _scan(
    source: Path | None,
    places: dict[str, Path | Container],
    labels: Path | None,
    synsets: Path | None,
    val_draw: ValDraw | None,
    out: str | os.PathLike[str] | None,
    columns: ImageColumns,
    *,
    is_source: bool,
    is_given: bool,
) -> Scan:
    roots = {name: path_of(place) for name, place in places.items()}
    not_walked = [] if out is None else [Path(out), Path(out) / UNFINISHED_NAME]
    read = [path for path in (labels, synsets) if path is not None]
    listed = {name: list_container(place, columns) for name, place in places.items() if isinstance(place, Container)}
    read += [container.names_file for container in listed.values() if container.names_file is not None]
    splits: dict[str, SplitImages] = {}
    train, val = roots["train"], roots.get("val")
    if "train" in listed:
        splits["train"] = listed["train"].split(listed["train"].labels.classes)
    else:
        classes_here = _gather(train, Exclusions.of([*not_walked, *_other(val, train)], read))
        splits["train"] = _train_split(classes_here, train, is_source=is_source, is_given=is_given)
    classes = splits["train"].classes
    if "val" in listed:
        if labels is not None:
            raise UserError(f"{labels}: {val} has its labels in its files; omit --val-labels")
        splits["val"] = listed["val"].split(classes)
    elif val is not None:
        found = _gather(val, Exclusions.of([*not_walked, *_other(train, val)], read))
        if _is_flat(found, classes) and labels is None:
            labels = _labels_beside(found, synsets)
            read.append(labels)
        splits["val"] = _val_split(found, classes, labels, synsets)
    tally = Tally()
    for split in splits.values():
        place = "" if is_same(split.root, source) else place_name(split.root, source)
        tally.extend(split.left_out, place + "/" if split.root.is_file() else place)
    beside = Exclusions.of([*not_walked, *roots.values()], read)
    for root, skipped in other_files(listed.values(), beside):
        place = "" if is_same(root, source) else place_name(root, source)
        tally.add(skipped._replace(file=place + skipped.file))
    if source is not None and source.is_dir() and not any(is_same(root, source) for root in roots.values()):
        for skipped in _unused(source, list(roots.values()), beside):
            tally.add(skipped)
    if val_draw is not None:
        splits["train"], splits["val"] = draw_val(splits["train"], val_draw)
    share, seed = (None, 0) if val_draw is None else (val_draw.share, val_draw.seed)
    names = {name: place_name(path, source) for name, path in roots.items()}
    for name, (container, *_, shown) in listed.items():
        names[name] += f"{container.pattern if container.is_folder else ''}{shown}"
    return Scan(classes, splits, Origin(names, tally.result(), share, seed))


def _is_parquet(place: Path | Container) -> bool:
    return isinstance(place, Container) and place.kind == "parquet"


def _other(other: Path | None, root: Path) -> list[Path]:
    """The folder of the other split, which must be excluded from this one; empty if both are the same."""
    return [] if other is None or not other.is_dir() or is_same(other, root) else [other]


def _unused(source: Path, places: list[Path], exclusions: Exclusions) -> Iterator[Skipped]:
    """Yields the files of the source that are in none of its splits."""
    listed = list_folder(str(source), "", exclusions)
    archives = {path.name for path in places if path.is_file() and path.parent.absolute() == source.absolute()}
    yield from (skipped for skipped in listed.skipped if skipped.file not in archives)
    yield from (Skipped("images beside the splits, in none of them", name) for name in listed.images)
    for name in listed.folders:
        skipped = count_files(str(source / name), name, f"files of {name}/, which is no split", exclusions)
        if skipped.number or not exclusions.is_above(str(source / name)):
            yield skipped


def _train_split(found: Gathered, root: Path, *, is_source: bool, is_given: bool) -> SplitScan:
    """The train split, whose class folders define the classes."""
    if found.folders == ("",):
        raise UserError(
            f"{root}: {len(found.groups):,} images, but no class folders; sort them into {root}/CLASS/ first "
            "(ImageNet's val images, which come without: name them with --val, and their labels with --val-labels)"
        )
    classes = sorted({name for name, _ in found.places})
    if not found.is_archive:
        refuse_splits(found, root, classes, is_source=is_source, is_given=is_given)
    return found.by_folder(classes)


def _is_flat(found: Gathered, classes: tuple[str, ...]) -> bool:
    """Whether the val images have no class folders. All of them may lie in one folder, such as val/ or images/."""
    beside = any(entry.kind == BESIDE_CLASSES for entry in found.left_out)
    return len(found.folders) == 1 and found.folders[0] not in classes and not beside


def _val_split(found: Gathered, classes: tuple[str, ...], labels: Path | None, synsets: Path | None) -> SplitScan:
    root = found.root
    if _is_flat(found, classes):
        assert labels is not None  # given, or found beside the images
        return found.by_labels(classes, read_labels(labels, root, found.file_names(), classes, synsets))
    unknown = sorted({name for name, _ in found.places} - set(classes))
    if unknown:
        raise UserError(
            f"{root}: {len(unknown)} class folder{'s' * (len(unknown) > 1)} that train does not have, "
            f"first {unknown[0]!r}; give both the same class names"
        )
    if labels is not None:
        raise UserError(f"{root}: its images are in class folders, which give their labels; omit --val-labels")
    return found.by_folder(classes)


def _labels_beside(found: Gathered, synsets: Path | None) -> Path:
    """The file of labels with a usual name beside the folder or archive of the val images."""
    root = found.root
    folder = root.parent
    files = [folder / name for name in LABELS_NAMES if (folder / name).is_file()]
    devkit = folder / DEVKIT_NAME
    if devkit.is_file() and (not files or (files == [folder / GROUND_TRUTH_NAME] and synsets is None)):
        files = [devkit]  # it has both the ground truth and the classes of its IDs
    if len(files) > 1:
        names = " and ".join(path.name for path in files)
        raise UserError(f"{root}: {names} beside it may have the labels; choose one with --val-labels")
    if not files:
        inside = f" in {found.folders[0]}/, which is no class of train, but" if found.folders != ("",) else ", but"
        raise UserError(
            f"{root}: {len(found.groups):,} images{inside} no class folders and no labels; sort them into "
            f"{root}/CLASS/, or give --val-labels FILE: {DEVKIT_NAME}, LOC_val_solution.csv, or a text file with 'FILE "
            "CLASS' in each line"
        )
    return files[0]


def _gather(root: Path, exclusions: Exclusions) -> Gathered:
    """Collects all images of a folder or archive. Raises `UserError` if there is none."""
    if not root.exists():
        raise UserError(f"{root}: no such folder or archive")
    is_archive = root.is_file()
    if not is_archive and not root.is_dir():
        raise UserError(f"{root}: not a folder, nor a tar archive")
    entries = archive_entries(root) if is_archive else folder_entries(root, exclusions)
    found = gather(root, entries, is_archive=is_archive)
    if not found.folders:
        needs = "CLASS/image.jpg or CLASS.tar entries" if is_archive else f"{root}/CLASS/image.jpg"
        if any(entry.kind == ".tar files" for entry in found.left_out):
            needs += ", or tars with a label (KEY.cls or KEY.json) beside each image (KEY.jpg)"
        holds = ", ".join(f"{entry.count:,} {entry.kind} ({entry.example})" for entry in found.left_out[:3])
        raise UserError(
            f"{root}: no class folders with images in it; it needs {needs}" + f", but holds {holds}" * bool(holds)
        )
    return found
