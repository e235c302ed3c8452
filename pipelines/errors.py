"""Errors that a user can mend, and how a command ends on one: one line, exit status 2, no traceback."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Final

from sdpnet.pipelines.lasting_output import silence
from sdpnet.pipelines.startup import end_on_interrupt, raise_on_interrupt

__all__ = [
    "BackendMissingError",
    "ImageFileError",
    "ShardError",
    "UserError",
    "nearest",
    "printable",
    "require",
    "run_command",
]

# What acts on a terminal, ends a line, turns the direction of the text after it, or cannot be encoded: control
# characters (C0, DEL, C1), marks of direction and of lines, halves of surrogate pairs, and what XML forbids.
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(name: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """A name on one line, safe for terminals, logs, HTML and XML; ordinary text of any language stays as it is.

    Control characters, line ends, marks that turn the direction of text, and bytes that are not UTF-8 become escapes
    as in Python's strings: a newline `\\n`, ESC `\\x1b`, the byte 0xff `\\xff`, U+202E `\\u202e`. Backslashes stay
    as they are, so that a text may pass through here twice.
    """
    name = os.fspath(name)
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    char = match.group()
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8 (PEP 383)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class UserError(ValueError):
    """A user's mistake. The message is one line: what is wrong, where, and what to do about it.

    The message is made `printable` here, so that no name in it reaches a terminal with control characters.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ShardError(UserError):
    """A shard, or its manifest, is not what it claims to be."""


class ImageFileError(UserError):
    """An image file that cannot be decoded. The message says why and what to do, but not which file it is: whoever
    knows its name puts that before it."""


class BackendMissingError(UserError):
    """A pipeline was asked for whose library cannot be imported here."""


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises `UserError` for a setting outside its range: its key, its value and what is allowed."""
    if not ok:
        raise UserError(f"{key} = {value!r}: must be {allowed}")


def nearest(word: str, known: Iterable[str]) -> str:
    """For the message about an unknown name: the known name that is most like it, or else all of them."""
    names = list(known)
    near = get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"


def run_command(main: Callable[[], int | None]) -> int:
    """Runs a command line's body and turns a `UserError`, or the system's refusal, into one line on stderr.

    Returns the exit status: what `main` returned (None counts as 0), 2 after such an error or where memory or threads
    are used up, or 130 after Ctrl-C outside the training loop (which handles its own).
    """
    raise_on_interrupt()
    try:
        return main() or 0
    except UserError as error:
        _complain(f"error: {error}")
        return 2
    except OSError as error:  # no such directory, no permission, disk full: the user's to mend too
        if error.errno is None:
            raise
        where = f"{printable(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        _complain(f"error: {where}{printable(error.strerror or type(error).__name__)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if "can't start new thread" in str(error):
            _complain(
                "error: the system starts no more threads; end other programs, or raise the limits (ulimit -u, -v)"
            )
            return 2
        if not _is_lack_of_memory(error):
            raise
        _complain("error: out of memory; end other programs, ask for less, or raise the process's limit (ulimit -v)")
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    finally:
        end_on_interrupt()


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether it is Python's or numpy's MemoryError, or one of torch's, which this module does not import."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return re.search("can't allocate memory|[Ss]ize calculation overflowed", str(error)) is not None


def _complain(line: str) -> None:
    """Prints a line on stderr, where there still is one: a lost terminal must not change the exit status."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)
