"""Errors that a user can fix. A command ends on one with a single line, exit status 2 and no traceback."""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Final

from sdpnet.pipelines.lasting_output import open_standard_streams, print_note, silence
from sdpnet.pipelines.startup import end_on_interrupt, raise_on_interrupt

__all__ = [
    "STDOUT",
    "BackendMissingError",
    "ImageFileError",
    "ShardError",
    "UserError",
    "nearest",
    "printable",
    "require",
    "run_command",
]

STDOUT: Final = "standard output"  # the file name in an error of writing to it

# Characters that control a terminal, end a line, change the direction of the text after them, or cannot be encoded:
# control characters (C0, DEL, C1), direction marks, line separators, halves of surrogate pairs, and what XML forbids.
_UNPRINTABLE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(name: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """Escapes a name so that it fits on one line and is safe for terminals, logs, HTML and XML.

    Ordinary text of any language does not change. Control characters, line ends, direction marks, and bytes that are
    not UTF-8 become escapes as in Python's strings: a newline `\\n`, ESC `\\x1b`, the byte 0xff `\\xff`, U+202E
    `\\u202e`. Backslashes do not change, so a text may be escaped twice.
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
    """A user's mistake. The message is one line that says what is wrong, where, and what to do about it.

    The message is made `printable`, so that no name in it reaches a terminal with control characters.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class ShardError(UserError):
    """A shard set is missing, damaged, or does not match its manifest."""


class ImageFileError(UserError):
    """An image file that cannot be decoded.

    The message says why and what to do, but not which file it is: the caller, which knows the name, puts it in front.
    """


class BackendMissingError(UserError):
    """The library of the requested pipeline cannot be imported."""


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raises `UserError` unless `ok`; the message has the setting's key, its value and what is allowed."""
    if not ok:
        raise UserError(f"{key} = {value!r}: must be {allowed}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Part of a message about an unknown name: suggests the most similar known name, or lists all of them."""
    names = list(known)
    near = get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"


def run_command(main: Callable[[], int | None]) -> int:
    """Runs the body of a command, and turns a `UserError` or an `OSError` into one line on stderr.

    Returns:
        the exit status: the result of `main` (0 for None), 2 after such an error or when memory or threads are used up,
        130 after Ctrl-C, or 141 if the reader of stdout has gone, as after `| head`; in shells this is the status of a
        process that SIGPIPE ended. The training loop handles Ctrl-C itself.
    """
    raise_on_interrupt()
    open_standard_streams()
    try:
        return main() or 0
    except UserError as error:
        print_note(f"error: {error}")
        return 2
    except BrokenPipeError as error:
        if error.filename != STDOUT and not _reader_has_gone():
            print_note(f"error: {printable(error.strerror or 'Broken pipe')}")
            return 2
        silence(sys.stdout)
        return 141
    except OSError as error:  # no such directory, no permission, disk full: the user can fix these too
        if error.errno is None:
            raise
        where = f"{printable(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        print_note(f"error: {where}{printable(error.strerror or type(error).__name__)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if "can't start new thread" in str(error):
            print_note(
                "error: the system starts no more threads; end other programs, or raise the limits (ulimit -u, -v)"
            )
            return 2
        if not _is_lack_of_memory(error):
            raise
        print_note("error: out of memory; end other programs, ask for less, or raise the process's limit (ulimit -v)")
        return 2
    except KeyboardInterrupt:
        print_note("interrupted")
        return 130
    finally:
        end_on_interrupt()


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file, or closed
        return False


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error is Python's or numpy's `MemoryError`, or one of torch's, which this module does not import."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return re.search("can't allocate memory|[Ss]ize calculation overflowed", str(error)) is not None
