"""Errors that a user can mend, and how a command ends on one: one line, exit status 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches

__all__ = ["BackendMissingError", "ImageFileError", "ShardError", "UserError", "nearest", "require", "run_command"]


class UserError(ValueError):
    """A user's mistake. The message is one line: what is wrong, where, and what to do about it."""


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

    Returns the exit status: what `main` returned (None counts as 0), 2 after such an error, or 130 after Ctrl-C outside
    the training loop (which handles its own).
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no such directory, no permission, disk full: the user's to mend too
        if error.errno is None:
            raise
        print(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
