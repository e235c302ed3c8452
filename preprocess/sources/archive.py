"""Lists the images of a tar archive and their positions in the file, without unpacking it.

ILSVRC2012_img_train.tar      CLASS.tar entries, with the images of a class in each
any tar of class folders      [FOLDER/]CLASS/[.../]image.jpg
ILSVRC2012_img_val.tar        [FOLDER/]image.jpg
"""

from __future__ import annotations

import os
import re
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
from sdpnet.preprocess.sources.listing import Entry, num_folders_above
from sdpnet.preprocess.sources.splits import likely_splits

__all__ = ["archive_entries"]

COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
}
UNSAFE_NAME: Final = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\x00-\x1f\x7f\\]")
FILE_TYPES: Final = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
REFUSED_TYPES: Final = {
    tarfile.SYMTYPE: ("a symbolic link", "make the archive again with tar --dereference"),
    tarfile.LNKTYPE: ("a hard link", "make the archive again with tar --hard-dereference"),
    tarfile.CHRTYPE: ("a device", "make the archive again without it"),
    tarfile.BLKTYPE: ("a device", "make the archive again without it"),
    tarfile.FIFOTYPE: ("a named pipe", "make the archive again without it"),
}
_LABEL_SUFFIXES: Final = (".cls", ".json", ".txt")
MAX_HEADER: Final = 1 << 20  # bytes of a long name or PAX header; a file name has at most 4,096
MAX_PADDING: Final = 1 << 20  # zeros after the end mark; tar's default rounds up to 10,240 bytes


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
        _require_tar(path, file.read(tarfile.BLOCKSIZE))
        first: dict[tuple[str, ...], str] = {}  # the first image of each folder
        class_tars: dict[str, tuple[str, tuple[str, ...]]] = {}  # class -> name and folder of its tar
        folders: set[tuple[str, ...]] = set()
        for entry in _entries(_Window(file.fileno(), 0, size), str(path)):
            parts = _parts(entry)
            folder = tuple(parts if entry.isdir() else parts[:-1])
            hidden = _kind_of_folders(folder)
            if not hidden:
                folders.add(folder)
            if entry.isdir():
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
                window = _Window(file.fileno(), entry.offset_data, entry.size)
                yield from _class_tar(window, stem, f"{path}: {entry.name}")
                continue
            kind = kind or _kind_of_file(file.fileno(), entry)
            if kind:
                yield Skipped(kind, name)
                continue
            if class_tars:
                raise _not_in_one_place(path, next(iter(class_tars.values()))[0], entry.name)
            first.setdefault(folder, entry.name)
            yield Entry("/".join(folder), parts[-1], entry.offset_data, entry.size)
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


def _class_tar(window: _Window, class_name: str, name: str) -> Iterator[Entry | Skipped]:
    num_images = num_others = 0
    for entry in _entries(window, name):
        if entry.isdir():
            continue
        parts = _parts(entry) or [""]
        kind = _kind_of_folders(parts[:-1]) or (kind_by_name(parts[-1]) if parts[-1] else "entries without a name")
        kind = kind or _kind_of_file(window.descriptor, entry)
        if kind:
            num_others += 1
            yield Skipped(kind, f"{class_name}/{'/'.join(parts)}")
            continue
        num_images += 1
        yield Entry(class_name, parts[-1], entry.offset_data, entry.size)
    if not num_images:
        raise UserError(f"{name}: a class without images ({num_others} other files); make the archive again without it")


class _Window:
    """A part of a file, with the methods that tarfile needs. Offsets are those of the whole file.

    A damaged or hostile header can announce a name of any length, and tarfile would read all of it into memory. `read`
    therefore refuses more than MAX_HEADER bytes.
    """

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self.descriptor, self.end = descriptor, start + size
        self.position = start

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data = os.pread(self.descriptor, max(0, min(size, self.end - self.position)), self.position)
        self.position += len(data)
        return data


def _entries(window: _Window, name: str) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files and directories of an archive up to its end mark. Every entry is checked."""
    stop = window.position
    try:
        archive = tarfile.TarFile(fileobj=window)  # type: ignore[arg-type]
        for entry in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # otherwise all of them stay in memory
            _require_harmless(entry, name)
            is_file = entry.type in FILE_TYPES
            end = entry.offset_data + (-(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if is_file else 0)
            if entry.size < 0 or end != archive.offset or end <= stop:
                raise tarfile.ReadError(f"impossible size of {entry.name!r}")
            if end > window.end:
                raise _cut_off(name, f"{entry.name!r} goes on for {end - window.end:,} bytes after its end")
            stop = end
            yield entry
        _require_end(window, stop, name)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except Exception as error:  # tarfile raises several types on damaged headers
        reason = " ".join(str(error).split()) or type(error).__name__
        if window.position >= window.end:
            raise _cut_off(name, f"the entry at byte {stop:,} is incomplete") from None
        raise UserError(f"{name}: damaged at byte {stop:,} ({reason}); copy or download it again") from None


def _require_end(window: _Window, stop: int, name: str) -> None:
    """Raises an error unless the archive ends at `stop`, with two blocks of zeros.

    tarfile stops at anything that is not a header, without an error, so that a truncated archive would look complete.
    """
    window.seek(stop)
    mark = window.read(2 * tarfile.BLOCKSIZE)
    if any(mark[: tarfile.BLOCKSIZE]) and len(mark) >= tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no header")
    if len(mark) < 2 * tarfile.BLOCKSIZE:
        raise _cut_off(name, "its end mark is missing")
    num_remaining = window.end - window.position
    if any(mark) or num_remaining > MAX_PADDING or any(window.read(num_remaining)):
        raise UserError(
            f"{name}: goes on after the end mark at byte {stop:,}; the download is incomplete (download it again), "
            "or several archives were joined (give them one by one)"
        )


def _cut_off(name: str, what: str) -> UserError:
    return UserError(f"{name}: cut off: {what}; copy or download it again")


def _require_harmless(entry: tarfile.TarInfo, name: str) -> None:
    """Raises `UserError` for an entry that is neither a regular file nor a folder, or that leads out of the archive."""
    if UNSAFE_NAME.search(entry.name):
        what, remedy = "not a plain relative name", "make the archive again with names of that kind"
    elif entry.issparse() or any(key.startswith("GNU.sparse") for key in entry.pax_headers):
        what, remedy = "a sparse file", "make the archive again without tar's --sparse"
    elif entry.type in FILE_TYPES or entry.isdir():
        return
    else:
        unknown = (f"an entry of the unknown type {entry.type!r}", "make the archive again without it")
        what, remedy = REFUSED_TYPES.get(entry.type, unknown)
    raise UserError(f"{name}: {entry.name!r} is {what}; {remedy}")


def _parts(entry: tarfile.TarInfo) -> list[str]:
    """The parts of an entry's name, without empty parts and dots."""
    return [part for part in entry.name.split("/") if part not in ("", ".")]


def _kind_of_folders(folders: Iterable[str]) -> str | None:
    """The kind of all files in these nested folders; None for ordinary folders."""
    return next((kind for folder in folders if (kind := kind_of_folder(folder))), None)


def _kind_of_file(descriptor: int, entry: tarfile.TarInfo) -> str | None:
    """The kind of a file, by its suffix or else by its first bytes; None for an image."""
    if has_image_suffix(entry.name):
        return None
    head = os.pread(descriptor, min(HEAD_BYTES, entry.size), entry.offset_data)
    return None if is_image(head) else kind_by_suffix(entry.name, entry.size)


def _require_tar(path: Path, block: bytes) -> None:
    """Raises `UserError` unless `block`, the first block of a file, is a tar header."""
    for magic, kind in COMPRESSED.items():
        if block.startswith(magic):
            raise UserError(
                f"{path}: compressed ({kind}); decompress it first: images are read in any order, which a compressed "
                "archive does not allow"
            )
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        pass  # an empty archive
    except tarfile.HeaderError:
        raise UserError(f"{path}: not a folder, nor a tar archive") from None
