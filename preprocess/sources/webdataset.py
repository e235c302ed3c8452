"""Lists the images of WebDataset tars: the tar, the position, the key and the label of each. Only labels are read.

A sample is an image KEY.jpg and a label KEY.cls, KEY.json or KEY.txt (`sdpnet.preprocess.sources.files.sample_label`).
KEY is the path up to the first dot of the file name. The files of a key are usually one after the other, but need not
be. The image may be of any format.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Final, NamedTuple

import numpy as np

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.kinds import HEAD_BYTES
from sdpnet.pipelines.shards.origin import LeftOut
from sdpnet.preprocess.sources.containers.labels import ClassLabels, checked_names
from sdpnet.preprocess.sources.containers.split import TarAddresses
from sdpnet.preprocess.sources.files.file_kinds import (
    IMAGE_SUFFIXES,
    LABEL_BESIDE,
    READ_FOR_LABELS,
    Skipped,
    Tally,
    has_image_suffix,
    is_image,
    kind_by_name,
    kind_by_suffix,
    kind_of_folder,
)
from sdpnet.preprocess.sources.files.sample_label import LABEL_SUFFIXES, LabelReader
from sdpnet.preprocess.sources.files.tar_members import Member, TarMembers, TarWindow, require_tar
from sdpnet.preprocess.sources.listing import mapped

__all__ = ["LABELS_ALONE", "Sample", "is_webdataset", "list_tars", "samples"]

LABELS_ALONE: Final = "labels without an image of the same name"
_LOOKED_AT: Final = 512  # the first members of a tar, which show whether it is a WebDataset


class Sample(NamedTuple):
    """An image of a tar.

    Attributes:
        key: the name that the image and its label share, with folders but without suffix.
        file: the name of the image in the tar.
        offset: the position of its first byte in the tar.
        size: its size in bytes.
        label: an integer from 0 to `MAX_CLASSES` - 1, or the name of its class.
        class_name: the name that the JSON file gives to an integer, if it was looked for and has one.
    """

    key: str
    file: str
    offset: int
    size: int
    label: int | str
    class_name: str | None = None


@dataclass(eq=False)
class _Group:
    """The files of one key: its image and its labels by suffix."""

    key: str
    image: Member | None = None
    labels: dict[str, Member] = field(default_factory=dict)
    others: list[Member] = field(default_factory=list)  # all other files


def is_webdataset(path: Path) -> bool:
    """Whether most of the first images of a tar have a label of the same name beside them.

    In a tar of class folders, only a `.cls` file counts as a label. Returns False if the tar cannot be read.
    """
    images: dict[str, bool] = {}  # whether there is a .cls file beside it, or another label
    labels: dict[str, bool] = {}
    folders = set()
    try:
        with path.open("rb", buffering=0) as file:
            window = TarWindow(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            for member in islice(TarMembers(window, str(path)), _LOOKED_AT):
                folder, file_name, key, suffix = _split(member.name)
                if member.is_folder or kind_by_name(file_name):
                    continue
                if suffix in LABEL_SUFFIXES:
                    labels[key] = labels.get(key, False) or suffix == ".cls"
                elif has_image_suffix(file_name):
                    images[key] = True
                    folders.add(folder)
    except (OSError, UserError):
        pass  # what was read before it may be enough; the error is reported when the whole tar is read
    labelled = [labels[key] for key in images if key in labels]
    return 2 * len(labelled) > len(images) and (len(folders) == 1 or any(labelled))


def samples(path: Path, named: set[int] | None = None) -> Iterator[Sample | Skipped]:
    """Yields the images of a tar in its order, and all other files. An image comes after the last file of its key.

    Args:
        path: the tar.
        named: the integers for which no class name is looked for. Labels are added to it. The default looks for none.

    Raises:
        UserError: the tar is compressed, damaged or truncated; it has no images; an image has no label, or a label
            that is neither an integer from 0 to `MAX_CLASSES` - 1 nor the name of a class; or a key has two images or
            two labels. The message names the tar and the key.
    """
    with path.open("rb", buffering=0) as file:
        require_tar(path, file.read(tarfile.BLOCKSIZE))
        window = TarWindow(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        members = TarMembers(window, str(path))
        reader = LabelReader(path, members, named)
        hashes = array("q")  # of the keys of the samples
        apart: dict[str, _Group] = {}  # keys of which a label or the image is missing so far
        for group in _groups(path, members):
            if isinstance(group, Skipped):
                yield group
                continue
            if (earlier := apart.pop(group.key, None)) is not None:
                _merge(path, earlier, group)
                group = earlier
            if group.image is None or (found := reader.label(group.labels)) is None:
                apart[group.key] = group
                continue
            hashes.append(hash(group.key))
            yield from _others(group, found.suffix)
            name, offset, size, _ = group.image
            yield Sample(group.key, name, offset, size, found.label, found.class_name)
        _require_unique(path, hashes, apart)
        yield from _incomplete(path, apart, len(hashes))


def _groups(path: Path, members: TarMembers) -> Iterator[_Group | Skipped]:
    """Yields the files of a tar in groups: as long as the same key follows. Files that are hidden are skipped."""
    group: _Group | None = None
    last_folder, hidden = "", None
    for member in members:
        if member.is_folder:
            continue
        folder, file_name, key, suffix = _split(member.name)
        if folder != last_folder:
            last_folder = folder
            hidden = next((kind for part in folder.split("/") if (kind := kind_of_folder(part))), None)
        if kind := hidden or kind_by_name(file_name):
            yield Skipped(kind, member.name)
            continue
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = _Group(key)
        if suffix in LABEL_SUFFIXES:
            if suffix in group.labels:
                raise _twice(path, key, "labels", group.labels[suffix], member)
            group.labels[suffix] = member
        elif suffix in IMAGE_SUFFIXES or has_image_suffix(file_name) or is_image(members.read(member, HEAD_BYTES)):
            if group.image is not None:
                raise _twice(path, key, "images", group.image, member)
            group.image = member
        else:
            group.others.append(member)
    if group is not None:
        yield group


def _split(name: str) -> tuple[str, str, str, str]:
    """The folder of a file in a tar ("" for none), its name, its key, and its suffix from the first dot on."""
    if name.startswith(".") or "//" in name or "/." in name:  # "./" at the beginning is frequent
        name = "/".join(part for part in name.split("/") if part not in ("", "."))
    folder, slash, file_name = name.rpartition("/")
    stem, dot, suffix = file_name.partition(".")
    return folder, file_name, folder + slash + stem, (dot + suffix).lower()


def _merge(path: Path, earlier: _Group, later: _Group) -> None:
    """Adds the files of a key that follow after those of other keys."""
    if earlier.image is not None and later.image is not None:
        raise _twice(path, later.key, "images", earlier.image, later.image)
    earlier.image = earlier.image or later.image
    for suffix, member in later.labels.items():
        if suffix in earlier.labels:
            raise _twice(path, later.key, "labels", earlier.labels[suffix], member)
        earlier.labels[suffix] = member
    earlier.others += later.others


def _others(group: _Group, used: str) -> Iterator[Skipped]:
    """The files beside an image. `used` is the suffix of the file that has its label."""
    for suffix, member in group.labels.items():
        yield Skipped(READ_FOR_LABELS if suffix == used else LABEL_BESIDE, member.name)
    for member in group.others:
        yield Skipped(LABEL_BESIDE, member.name)


def _require_unique(path: Path, hashes: array[int], apart: dict[str, _Group]) -> None:
    """Raises `UserError` if two samples of a tar have the same key, or a complete sample has a further file.

    Only the hashes of the keys are kept, because a tar may have millions of them.
    """
    seen = np.array(hashes, np.int64)
    seen.sort()
    twice = set(seen[1:][seen[1:] == seen[:-1]].tolist())
    others = np.array([hash(key) for key in apart], np.int64)
    twice |= set(others[np.isin(others, seen)].tolist())
    if not twice:
        return
    first: dict[str, _Group] = {}
    with path.open("rb", buffering=0) as file:
        window = TarWindow(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        for group in _groups(path, TarMembers(window, str(path))):
            if isinstance(group, Skipped) or hash(group.key) not in twice:
                continue
            if group.key in first:
                _merge(path, first[group.key], group)
            else:
                first[group.key] = group


def _incomplete(path: Path, apart: dict[str, _Group], num_samples: int) -> Iterator[Skipped]:
    """Yields the files of keys without an image. Raises `UserError` for images without a label."""
    unlabelled = [group for group in apart.values() if group.image is not None]
    if unlabelled:
        raise UserError(
            f"{path}: no label for {len(unlabelled):,} of its {num_samples + len(unlabelled):,} images, first "
            f"{unlabelled[0].key!r}; each KEY.jpg needs a KEY.cls or KEY.json with its label in the same tar"
        )
    if not num_samples:
        raise UserError(f"{path}: no images with labels in it; copy or download it again, or remove it")
    for group in apart.values():
        for member in group.labels.values():
            yield Skipped(LABELS_ALONE, member.name)
        for member in group.others:
            yield Skipped(kind_by_suffix(member.name, member.size), member.name)


def _twice(path: Path, key: str, what: str, one: Member, other: Member) -> UserError:
    return UserError(
        f"{path}: {key!r} has two {what}, {one.name!r} and {other.name!r}; make the tar again with one image and one "
        "label for each key"
    )


def list_tars(
    root: Path, paths: Sequence[Path], names: tuple[str, ...] | None = None
) -> tuple[ClassLabels, TarAddresses, tuple[LeftOut, ...]]:
    """Lists the images of tars, in the order of the tars and of the images in them.

    Args:
        root: the folder of the tars.
        paths: the tars.
        names: the names of the classes in label order. The default is the names in the JSON files of the samples, if
            they name each integer and no two integers alike.

    Returns:
        the labels, the addresses, and the other files by kind.

    Raises:
        UserError: as in `samples`, and if some labels are integers and others are texts.
    """
    tars = tuple(path.relative_to(root).as_posix() for path in paths)
    places, offsets, sizes, ends = array("i"), array("q"), array("q"), array("q")
    values = array("q")
    texts: dict[str, int] = {}
    named: set[int] = set()
    found_names: dict[int, str] = {}
    first: tuple[Path, Sample] | None = None
    tally = Tally()
    end = 0
    with tempfile.TemporaryFile() as file:
        for place, path in enumerate(paths):
            for sample in samples(path, named if names is None else None):
                if isinstance(sample, Skipped):
                    tally.add(Skipped(sample.kind, f"{tars[place]}/{sample.file}"))
                    continue
                _, name, offset, size, label, class_name = sample
                first = first or (path, sample)
                if isinstance(label, str) != isinstance(first[1].label, str):
                    raise UserError(
                        f"{path}: the label of {sample.key!r} is {shorten(repr(label), 60)}, but that of "
                        f"{first[1].key!r} in {first[0].name} is {shorten(repr(first[1].label), 60)}; make the tars "
                        "again with labels of one kind"
                    )
                values.append(texts.setdefault(label, len(texts)) if isinstance(label, str) else label)
                if class_name is not None:
                    found_names[int(label)] = class_name
                end += file.write(os.fsencode(name))
                ends.append(end)
                places.append(place)
                offsets.append(offset)
                sizes.append(size)
        all_names = mapped(file)
    labels = np.array(values, np.int64)
    where = f"{root}" if len(paths) > 1 else f"{paths[0]}"
    if texts:
        ordered = sorted(texts)
        numbers = np.empty(len(texts), np.int64)
        numbers[[texts[text] for text in ordered]] = np.arange(len(ordered))
        labels, names = numbers[labels], checked_names(ordered, where)
    elif names is None and len(set(found_names.values())) == len(found_names) == int(labels.max()) + 1:
        names = checked_names([found_names[label] for label in range(len(found_names))], where)
    arrays = (np.array(places, np.int32), np.array(offsets, np.int64), np.array(sizes, np.int64))
    addresses = TarAddresses(root, tars, *arrays, all_names, np.array(ends, np.int64))
    return ClassLabels(where, labels, names), addresses, tally.result()
