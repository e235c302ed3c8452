"""Decides which files of a data set are images and names the kinds of all others, so that none disappears unreported.

A file with a usual suffix of images is taken for an image without looking into it: it is either converted or reported
with the reason why it cannot be. For any other file the first bytes decide.
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
# Files with one of these suffixes are not opened while the data set is listed.
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
_DOCUMENTS: Final = ("a PDF document", "a DjVu document")  # `kind_of` counts them as images; in a data set they are not
_SUFFIX: Final = re.compile(r"\.[A-Za-z0-9]{1,8}")
_MAX_KINDS: Final = 40  # the number of kinds of a split; files of further kinds are counted together


class Skipped(NamedTuple):
    """Files that are not images of a class: their kind, the path of the first one below the root, and their number."""

    kind: str
    file: str
    number: int = 1


def has_image_suffix(name: str) -> bool:
    """Whether the suffix of a file is a usual one of images."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def kind_of_folder(name: str) -> str | None:
    """The kind of all files below a folder with this name; None for an ordinary folder."""
    if kind := _FOLDERS.get(name.lower()):
        return kind
    return "files in hidden folders" if name.startswith(".") else None


def kind_by_name(name: str) -> str | None:
    """The kind of a file whose name shows that it is not an image; None for any other file."""
    if kind := _FILES.get(name.lower()):
        return kind
    if name.startswith("._"):
        return _MACOS
    return "hidden files" if name.startswith(".") else None


def is_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes is an image of any format. At most `HEAD_BYTES` bytes are used."""
    kind = kind_of(head[:HEAD_BYTES])
    return kind.is_image and kind.name not in _DOCUMENTS


def kind_by_suffix(name: str, size: int | None = None) -> str:
    """The kind of a file that is not an image. `size`: its size in bytes, if known."""
    if size == 0:
        return "empty files"
    suffix = os.path.splitext(name)[1]
    if not suffix:
        return "files without a suffix that are no images"
    return f"{suffix.lower()} files" if _SUFFIX.fullmatch(suffix) else "other files that are no images"


class Tally:
    """Counts the files that are not converted by kind, with the first example of each kind in the order of names."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, skipped: Skipped) -> None:
        """Adds files of one kind."""
        kind = skipped.kind
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            kind = "files of other kinds"
        count, example = self._kinds.get(kind, (0, skipped.file))
        self._kinds[kind] = count + skipped.number, min(example, skipped.file)

    def extend(self, left_out: Iterable[LeftOut], place: str) -> None:
        """Adds the counts of a folder (`place` with "/" at its end) or archive."""
        for entry in left_out:
            self.add(Skipped(entry.kind, place + entry.example, entry.count))

    def result(self) -> tuple[LeftOut, ...]:
        """The counts, with the most frequent kind first."""
        ordered = sorted(self._kinds.items(), key=lambda item: (-item[1][0], item[0]))
        return tuple(LeftOut(kind, count, example) for kind, (count, example) in ordered)
