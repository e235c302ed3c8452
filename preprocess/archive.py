"""Lists the images of a tar archive without unpacking it: where in the file each one lies.

ILSVRC2012_img_train.tar      CLASS.tar entries, with the images of a class in each
any tar of class folders      [FOLDER/]CLASS/image.jpg
ILSVRC2012_img_val.tar        [FOLDER/]image.jpg
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pipelines.errors import UserError
from preprocess.listing import IMAGE_SUFFIXES, Entry

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
MAX_HEADER: Final = 1 << 20  # bytes of a long name or PAX header; a file name has at most 4,096
MAX_PADDING: Final = 1 << 20  # zeros after the end mark; tar's default rounds up to 10,240 bytes


def archive_entries(path: Path) -> Iterator[Entry | None]:
    """The images in an archive, in its order; None for each other file or hidden one. Directories are passed over.

    An image's class folder is the folder that it lies in, or the name of its class tar. Reads headers only, at most
    1 MiB at a time.

    Raises:
        UserError: naming the archive and the entry, for an archive that is compressed, damaged or cut off anywhere, or
            whose images lie in folders of different depth; for a class without images; and for any entry that is no
            plain file (links, devices, sparse files) or whose name leads out of it.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        _require_tar(path, file.read(tarfile.BLOCKSIZE))
        first = ""  # image or class tar
        place: tuple[str, tuple[str, ...]] | None = None  # where it is, and all the others must be
        class_tars: set[str] = set()
        folders: set[tuple[str, ...]] = set()
        with_images: set[str] = set()
        for entry in _entries(_Window(file.fileno(), 0, size), str(path)):
            parts = _visible_parts(entry)
            folders.add(tuple(parts if entry.isdir() else parts[:-1]))
            if entry.isdir():
                continue
            stem, suffix = os.path.splitext(parts[-1] if parts else "")
            is_class_tar = suffix.lower() == ".tar"
            if not is_class_tar and suffix.lower() not in IMAGE_SUFFIXES:
                yield None
                continue
            above = tuple(parts[:-1] if is_class_tar else parts[:-2])
            kind = "class tar" if is_class_tar else "image" if len(parts) == 1 else "image in a folder"
            if place is None:
                first, place = entry.name, (kind, above)
            if place != (kind, above):
                raise UserError(
                    f"{path}: {first!r} and {entry.name!r} are not in the same place; make one archive for each "
                    "split, in which all images are CLASS/FILE, or FILE"
                )
            if not is_class_tar:
                class_name = "".join(parts[-2:-1])
                with_images.add(class_name)
                yield Entry(class_name, parts[-1], entry.offset_data, entry.size)
                continue
            if stem in class_tars:
                raise UserError(f"{path}: {entry.name!r} is in it twice; make the archive again with each class once")
            class_tars.add(stem)
            yield from _class_tar(_Window(file.fileno(), entry.offset_data, entry.size), stem, f"{path}: {entry.name}")
    if place is not None and place[0] == "image in a folder":
        above = place[1]
        all_classes = {folder[len(above)] for folder in folders if folder[: len(above)] == above and folder != above}
        for class_name in sorted(all_classes - with_images):
            name = "/".join((*above, class_name))
            raise UserError(f"{path}: {name!r} is a class folder without images; make the archive again without it")


def _class_tar(window: _Window, class_name: str, name: str) -> Iterator[Entry | None]:
    num_images = num_others = 0
    for entry in _entries(window, name):
        if entry.isdir():
            continue
        parts = _visible_parts(entry)
        if not parts or os.path.splitext(parts[-1])[1].lower() not in IMAGE_SUFFIXES:
            num_others += 1
            yield None
            continue
        num_images += 1
        yield Entry(class_name, parts[-1], entry.offset_data, entry.size)
    if not num_images:
        raise UserError(f"{name}: a class without images ({num_others} other files); make the archive again without it")


class _Window:
    """A piece of a file as tarfile wants it, with the whole file's offsets; bounded in what a header can ask for."""

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
    """The plain files and directories of an archive, up to its end mark; every entry is checked."""
    stop = window.position
    try:
        archive = tarfile.TarFile(fileobj=window)  # type: ignore[arg-type]
        for entry in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # else all of them stay in memory
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
    """tarfile stops at anything that is no header, and says nothing; only two blocks of zeros are an end."""
    window.seek(stop)
    mark = window.read(2 * tarfile.BLOCKSIZE)
    if any(mark[: tarfile.BLOCKSIZE]) and len(mark) >= tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no header")
    if len(mark) < 2 * tarfile.BLOCKSIZE:
        raise _cut_off(name, "its end mark is missing")
    num_left = window.end - window.position
    if any(mark) or num_left > MAX_PADDING or any(window.read(num_left)):
        raise UserError(
            f"{name}: goes on after the end mark at byte {stop:,}; the download is incomplete (download it again), "
            "or several archives were joined (give them one by one)"
        )


def _cut_off(name: str, what: str) -> UserError:
    return UserError(f"{name}: cut off: {what}; copy or download it again")


def _require_harmless(entry: tarfile.TarInfo, name: str) -> None:
    """Raises `UserError` for an entry that is neither a plain file nor a folder, or that leads out of the archive."""
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


def _visible_parts(entry: tarfile.TarInfo) -> list[str]:
    """The parts of an entry's name; none for a hidden one."""
    parts = [part for part in entry.name.split("/") if part not in ("", ".")]
    return [] if any(part.startswith(".") for part in parts) else parts


def _require_tar(path: Path, block: bytes) -> None:
    """Raises `UserError` unless this first block of a file is a tar header."""
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
