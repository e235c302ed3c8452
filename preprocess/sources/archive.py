"""Lists the images of a tar archive and their positions in the file, without unpacking it.

ILSVRC2012_img_train.tar      CLASS.tar entries, with the images of a class in each
any tar of class folders      [FOLDER/]CLASS/[.../]image.jpg
ILSVRC2012_img_val.tar        [FOLDER/]image.jpg
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.kinds import HEAD_BYTES
from sdpnet.preprocess.sources.files.file_kinds import (
    LABEL_BESIDE,
    Skipped,
    has_image_suffix,
    is_image,
    kind_by_name,
    kind_by_suffix,
    kind_of_folder,
)
from sdpnet.preprocess.sources.files.tar_members import Member, TarMembers, TarWindow, require_tar
from sdpnet.preprocess.sources.listing import Entry, num_folders_above
from sdpnet.preprocess.sources.splits import likely_splits

__all__ = ["archive_entries"]

_LABEL_SUFFIXES: Final = (".cls", ".json", ".txt")


def archive_entries(path: Path) -> Iterator[Entry | Skipped]:
    """Yields the images and all other files of an archive, in its order. Directories are skipped.

    The class folder of an image is the first folder below the folders that all images share, or the name of its class
    tar. Only headers are read, at most 1 MiB at a time, and the first bytes of files whose names do not show their
    kind.

    Raises:
        UserError: the archive is compressed, damaged or truncated; its images lie in several splits or partly beside
            the class folders; a class has no images; or an entry is not a regular file (but a link, a device or a
            sparse file) or has a name that leads out of the archive. The message names the archive and the entry.
    """
    yield from _with_labels_named(_all_entries(path))


def _all_entries(path: Path) -> Iterator[Entry | Skipped]:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        require_tar(path, file.read(tarfile.BLOCKSIZE))
        first: dict[tuple[str, ...], str] = {}  # the first image of each folder
        class_tars: dict[str, tuple[str, tuple[str, ...]]] = {}  # class -> name and folder of its tar
        folders: set[tuple[str, ...]] = set()
        for entry in TarMembers(TarWindow(file.fileno(), 0, size), str(path)):
            parts = _parts(entry)
            folder = tuple(parts if entry.is_folder else parts[:-1])
            hidden = _kind_of_folders(folder)
            if not hidden:
                folders.add(folder)
            if entry.is_folder:
                continue
            if not parts:
                yield Skipped("entries without a name", entry.name)
                continue
            name = "/".join(parts)
            stem, suffix = os.path.splitext(parts[-1])
            kind = hidden or kind_by_name(parts[-1])
            if suffix.lower() == ".tar" and not kind:
                if stem in class_tars and class_tars[stem][1] == folder:
                    raise UserError(
                        f"{path}: {entry.name!r} is in it twice; make the archive again with each class once"
                    )
                others = [*first.values(), *(other for other, place in class_tars.values() if place != folder)]
                if others:
                    raise _not_in_one_place(path, others[0], entry.name)
                class_tars[stem] = entry.name, folder
                window = TarWindow(file.fileno(), entry.offset, entry.size)
                yield from _class_tar(window, stem, f"{path}: {entry.name}")
                continue
            kind = kind or _kind_of_file(file.fileno(), entry)
            if kind:
                yield Skipped(kind, name)
                continue
            if class_tars:
                raise _not_in_one_place(path, next(iter(class_tars.values()))[0], entry.name)
            first.setdefault(folder, entry.name)
            yield Entry("/".join(folder), parts[-1], entry.offset, entry.size)
    _require_one_place(path, first, folders)


def _with_labels_named(entries: Iterable[Entry | Skipped]) -> Iterator[Entry | Skipped]:
    """Yields the same entries, with the kind LABEL_BESIDE for labels beside an image of the same name (WebDataset)."""
    pending: Skipped | None = None  # the previous file; whether it is a label depends on the next one
    image_key = ""
    for entry in entries:
        if isinstance(entry, Skipped):
            if pending is not None:
                yield pending
            is_label = entry.file.lower().endswith(_LABEL_SUFFIXES) and _key(entry.file) == image_key
            pending = entry._replace(kind=LABEL_BESIDE) if is_label else entry
            continue
        image_key = _key(f"{entry.folder}/{entry.file}" if entry.folder else entry.file)
        if pending is not None:
            is_label = pending.file.lower().endswith(_LABEL_SUFFIXES) and _key(pending.file) == image_key
            yield pending._replace(kind=LABEL_BESIDE) if is_label else pending
            pending = None
        yield entry
    if pending is not None:
        yield pending


def _key(name: str) -> str:
    """The key of a sample in WebDataset: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _require_one_place(path: Path, first: dict[tuple[str, ...], str], folders: set[tuple[str, ...]]) -> None:
    """Raises `UserError` unless all images lie in class folders of one split, or none of them in a class folder.

    A class folder without images is an error, too.

    Args:
        path: the archive.
        first: the first image of each folder with images, in the archive's order.
        folders: all folders.
    """
    if not first:
        return
    num_above = num_folders_above(first)
    above = next(iter(first))[:num_above]
    classes: dict[str, str] = {}  # class -> its first image
    for folder, name in first.items():
        classes.setdefault("".join(folder[num_above : num_above + 1]), name)
    direct = {folder[num_above] for folder in first if len(folder) == num_above + 1}
    in_several_splits = len(classes) > 1 and bool(likely_splits(classes, classes.keys() - direct))
    if len(first) > 1 and (() in first or in_several_splits or len(classes) == 1):
        one, other, *_ = classes.values() if len(classes) > 1 else first.values()
        raise _not_in_one_place(path, one, other)
    if () in first:
        return
    all_classes = {folder[num_above] for folder in folders if folder[:num_above] == above and len(folder) > num_above}
    for class_name in sorted(all_classes - classes.keys()):
        name = "/".join((*above, class_name))
        raise UserError(f"{path}: {name!r} is a class folder without images; make the archive again without it")


def _not_in_one_place(path: Path, one: str, other: str) -> UserError:
    return UserError(
        f"{path}: {one!r} and {other!r} are not in the same place; make one archive for each split, in which all "
        "images are CLASS/FILE, or FILE"
    )


def _class_tar(window: TarWindow, class_name: str, name: str) -> Iterator[Entry | Skipped]:
    num_images = num_others = 0
    for entry in TarMembers(window, name):
        if entry.is_folder:
            continue
        parts = _parts(entry) or [""]
        kind = _kind_of_folders(parts[:-1]) or (kind_by_name(parts[-1]) if parts[-1] else "entries without a name")
        kind = kind or _kind_of_file(window.descriptor, entry)
        if kind:
            num_others += 1
            yield Skipped(kind, f"{class_name}/{'/'.join(parts)}")
            continue
        num_images += 1
        yield Entry(class_name, parts[-1], entry.offset, entry.size)
    if not num_images:
        raise UserError(f"{name}: a class without images ({num_others} other files); make the archive again without it")


def _parts(entry: Member) -> list[str]:
    """The parts of an entry's name, without empty parts and dots."""
    return [part for part in entry.name.split("/") if part not in ("", ".")]


def _kind_of_folders(folders: Iterable[str]) -> str | None:
    """The kind of all files in these nested folders; None for ordinary folders."""
    return next((kind for folder in folders if (kind := kind_of_folder(folder))), None)


def _kind_of_file(descriptor: int, entry: Member) -> str | None:
    """The kind of a file, by its suffix or else by its first bytes; None for an image."""
    if has_image_suffix(entry.name):
        return None
    head = os.pread(descriptor, min(HEAD_BYTES, entry.size), entry.offset)
    return None if is_image(head) else kind_by_suffix(entry.name, entry.size)
