"""Says which files of a data set are images, and of what kind all others are, so that none vanishes without a name.

A file with an image's usual suffix is one, whatever is in it: it is converted, or named with the reason why it cannot
be. Of any other file the first bytes decide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from sdpnet.pipelines.images.kinds import HEAD_BYTES, kind_of
from sdpnet.pipelines.shards.manifest import UNFINISHED_NAME
from sdpnet.pipelines.shards.origin import LeftOut

__all__ = [
    "BESIDE_CLASSES",
    "IMAGE_SUFFIXES",
    "LABEL_BESIDE",
    "READ_FOR_LABELS",
    "SHARD_SETS",
    "Skipped",
    "Tally",
    "has_image_suffix",
    "is_image",
    "kind_by_name",
    "kind_by_suffix",
    "kind_of_folder",
]

_TORCHVISION: Final = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # IMG_EXTENSIONS
_ALSO_JPEG: Final = (".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo")
_MORE: Final = (".gif", ".apng", ".dib", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx")
# Files with one of these are not opened while listing.
IMAGE_SUFFIXES: Final = frozenset((*_TORCHVISION, *_ALSO_JPEG, *_MORE))
BESIDE_CLASSES: Final = "images beside the class folders, in none of them"
READ_FOR_LABELS: Final = "files that were read for the labels"
LABEL_BESIDE: Final = "files of the same name as an image beside them"
SHARD_SETS: Final = "files of shard sets"
_MACOS: Final = "files of macOS metadata"
_WINDOWS: Final = "files of Windows' folder settings and thumbnails"
_FOLDERS: Final = {
    UNFINISHED_NAME: SHARD_SETS,
    "__macosx": _MACOS,
    "@eadir": "files of Synology thumbnails (@eaDir)",
    "#recycle": "files in a recycle bin",
    "$recycle.bin": "files in a recycle bin",
    "system volume information": "files of the file system",
    "lost+found": "files of the file system",
    "__pycache__": "files of Python's cache",
}
_FILES: Final = {
    ".ds_store": _MACOS,
    "icon\r": _MACOS,
    "thumbs.db": _WINDOWS,
    "ehthumbs.db": _WINDOWS,
    "desktop.ini": _WINDOWS,
}
_DOCUMENTS: Final = ("a PDF document", "a DjVu document")  # which show images, but lie among them as papers
_SUFFIX: Final = re.compile(r"\.[A-Za-z0-9]{1,8}")
_MAX_KINDS: Final = 40  # of one split; further ones count as other files


class Skipped(NamedTuple):
    """Files that are no image of a class: their kind, the first one's path below the root, and how many."""

    kind: str
    file: str
    number: int = 1


def has_image_suffix(name: str) -> bool:
    """Whether a file is taken for an image by its name alone."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def kind_of_folder(name: str) -> str | None:
    """The kind of all files below a folder of this name; None for an ordinary folder."""
    if kind := _FOLDERS.get(name.lower()):
        return kind
    return "files in hidden folders" if name.startswith(".") else None


def kind_by_name(name: str) -> str | None:
    """The kind of a file whose name alone says that it is no image; None for any other."""
    if kind := _FILES.get(name.lower()):
        return kind
    if name.startswith("._"):
        return _MACOS
    return "hidden files" if name.startswith(".") else None


def is_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes (up to `HEAD_BYTES`) is an image, of whatever format."""
    kind = kind_of(head[:HEAD_BYTES])
    return kind.is_image and kind.name not in _DOCUMENTS


def kind_by_suffix(name: str, size: int | None = None) -> str:
    """The kind of a file that is no image."""
    if size == 0:
        return "empty files"
    suffix = os.path.splitext(name)[1]
    if not suffix:
        return "files without a suffix that are no images"
    return f"{suffix.lower()} files" if _SUFFIX.fullmatch(suffix) else "other files that are no images"


class Tally:
    """Counts what is left out, by kind, with the first example by name."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, skipped: Skipped) -> None:
        kind = skipped.kind
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            kind = "files of other kinds"
        count, example = self._kinds.get(kind, (0, skipped.file))
        self._kinds[kind] = count + skipped.number, min(example, skipped.file)

    def extend(self, left_out: Iterable[LeftOut], place: str) -> None:
        """Adds what was left out below a folder (with "/" at its end) or archive."""
        for entry in left_out:
            self.add(Skipped(entry.kind, place + entry.example, entry.count))

    def result(self) -> tuple[LeftOut, ...]:
        """The most frequent kind first."""
        ordered = sorted(self._kinds.items(), key=lambda item: (-item[1][0], item[0]))
        return tuple(LeftOut(kind, count, example) for kind, (count, example) in ordered)
