"""Reads the development kit of ILSVRC2012: the class of each ID, and the IDs of the validation images.

IDs start at 1 and are not in the order of the class names: ID 1 is n02119789.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import tarfile
from pathlib import Path
from typing import Final

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.terminal.remedy import install

__all__ = ["DEVKIT_NAME", "GROUND_TRUTH_NAME", "is_devkit", "read_devkit", "read_synsets", "read_text"]

DEVKIT_NAME: Final = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH_NAME: Final = "ILSVRC2012_validation_ground_truth.txt"
META_NAME: Final = "meta.mat"
GZIP_START: Final = b"\x1f\x8b"
MAX_MEMBER: Final = 64 << 20  # bytes; the original files have less than 1 MB
MAX_BYTES: Final = 128 << 20  # of a file of labels or IDs, and of an unpacked development kit


def is_devkit(path: Path) -> bool:
    """Whether the name of the file is that of a packed development kit."""
    return path.name.lower().endswith((".tar.gz", ".tgz", ".tar"))


def read_devkit(path: Path) -> tuple[str, dict[int, str]]:
    """Reads a packed development kit: the text of its ground truth, and the class name (wnid) of each ID. Needs scipy.

    Raises:
        UserError: the kit cannot be read, is damaged, or lacks one of the two files.
    """
    found: dict[str, bytes] = {}
    if not path.exists():
        raise UserError(f"{path}: no such file")
    packed = _read(path)
    try:
        content = packed
        if packed.startswith(GZIP_START):
            with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
                content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_BYTES:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if name in (GROUND_TRUTH_NAME, META_NAME) and member.isreg() and member.size <= MAX_MEMBER:
                    start = member.offset_data
                    found[name] = content[start : start + member.size]
    except Exception as error:  # tarfile and zlib raise several types on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); copy or download it again") from None
    for name in (GROUND_TRUTH_NAME, META_NAME):
        if name not in found:
            raise UserError(f"{path}: has no {name} in it; download {DEVKIT_NAME} again")
    return _decode(found[GROUND_TRUTH_NAME], f"{path}: {GROUND_TRUTH_NAME}"), _from_meta(found[META_NAME], path)


def read_synsets(path: Path) -> dict[int, str]:
    """Reads the class name of each ID.

    The file is the devkit's meta.mat (needs scipy), the packed devkit, or a text file. The lines of a text file begin
    with `ID name`, with `name ID` (map_clsloc.txt), or with a name only; then line i is ID i.

    Raises:
        UserError: the file is of another form; an ID or a name occurs twice; or the lines have only names and these are
            in alphabetical order. That is not the order of the IDs, so it must be another list (such as
            synset_words.txt).
    """
    if is_devkit(path):
        return read_devkit(path)[1]
    if path.suffix.lower() == ".mat":
        return _from_meta(_read(path), path)
    lines = [line.split() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path}: empty; give the devkit's meta.mat or a list of class names in ID order")
    for id_column, name_column in ((0, 1), (1, 0)):
        if all(len(words) > 1 and re.fullmatch("[0-9]{1,9}", words[id_column]) for words in lines):
            pairs = [(int(words[id_column]), words[name_column]) for words in lines]
            break
    else:
        pairs = list(enumerate((words[0] for words in lines), 1))
        if len(pairs) > 1 and pairs == list(enumerate(sorted(name for _, name in pairs), 1)):
            raise UserError(
                f"{path}: class names in alphabetical order, which is not the order of ILSVRC2012's IDs; give the "
                "devkit's meta.mat, or map_clsloc.txt, or write 'ID name' in each line"
            )
    return _unique(pairs, path)


def read_text(path: Path) -> str:
    """The contents of a text file, with "\\n" as line ends. Raises `UserError` if it is not a text file in UTF-8."""
    return _decode(_read(path), str(path))


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is {'a directory' if path.is_dir() else 'a pipe or device'}; name a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES:,} bytes, which is too large for such a file; name another")
    return content


def _decode(content: bytes, name: str) -> str:
    encoding = _other_encoding(content)
    if encoding is not None:
        raise UserError(
            f"{name}: not a text file in UTF-8 but in {encoding}, as some programs of Windows write it; save it as "
            f"UTF-8, or convert it: iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}: not a text file in UTF-8 (line {line}); save it as UTF-8, or convert it, from Latin-1 perhaps: "
            "iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE"
        ) from None
    if "\0" in text:
        raise UserError(f"{name}: not a text file in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _other_encoding(content: bytes) -> str | None:
    """The name of the encoding if it is UTF-16 or UTF-32, else None.

    They are recognised by the byte order mark, or by the zero bytes of ASCII characters.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    head = content[: len(content) & ~1][:4096]
    for encoding, zeros, letters in (("UTF-16LE", head[1::2], head[::2]), ("UTF-16BE", head[::2], head[1::2])):
        if len(zeros) > 1 and not any(zeros) and all(letters):
            return encoding
    return None


def _from_meta(content: bytes, path: Path) -> dict[int, str]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(f"{path}: reading meta.mat needs scipy ({error}); {install('scipy')}") from None
    try:
        synsets = loadmat(io.BytesIO(content), variable_names=["synsets"])["synsets"].ravel()
        pairs = [(int(synset["ILSVRC2012_ID"].item()), str(synset["WNID"].item())) for synset in synsets]
    except Exception as error:  # scipy raises almost any type on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: no meta.mat of ILSVRC2012 ({reason}); download {DEVKIT_NAME} again") from error
    return _unique(pairs, path)


def _unique(pairs: list[tuple[int, str]], path: Path) -> dict[int, str]:
    synsets = dict(pairs)
    if len(synsets) < len(pairs) or len(set(synsets.values())) < len(pairs):
        raise UserError(f"{path}: an ID or a class name is in it twice; each ID must have one class of its own")
    return synsets
