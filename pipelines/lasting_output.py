"""Keeps a program running when its output is lost: a closed pipe, a lost terminal, a full disk, an old encoding."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TextIO, cast

__all__ = ["lasting_output", "open_standard_streams", "print_note", "silence"]

_PERMANENT_ERRORS = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV, errno.ECONNRESET, errno.ESTALE)


def silence(stream: TextIO) -> None:
    """Discards the buffered and all further output of a stream that failed.

    Otherwise Python would try to write it once more when it exits, and exit with status 120.
    """
    with suppress(OSError, ValueError):  # the stream is closed, or has no file descriptor
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
        stream.flush()


def print_note(text: str, end: str = "\n") -> None:
    """Prints a text on stderr at once. If that fails, this and all further texts are discarded.

    So a terminal that is gone or a log file on a full disk neither ends the work nor changes the exit status.
    """
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)


def open_standard_streams() -> None:
    """Opens the null device in place of each standard stream that was closed when the process started (`>&-`).

    Python sets such a stream to None.
    """
    _open_descriptors()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, _null_device())


@cache
def _null_device() -> TextIO:
    """A stream whose descriptor is open until the process ends, whatever becomes of `sys.stdout`."""
    return open(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8", closefd=False)


def _open_descriptors() -> None:
    # A closed standard descriptor would be given to the next file that is opened, and our lines would go into that
    # file.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


class _LastingStream:
    """A text stream whose `write` and `flush` never fail. All other attributes are those of the wrapped stream.

    Characters that the stream's encoding lacks are written as escapes.

    Args:
        stream: the stream to wrap.
        lost: called with the first error.
    """

    def __init__(self, stream: TextIO, lost: Callable[[BaseException], None]) -> None:
        self._stream, self._lost = stream, lost
        self._has_failed = self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def end(self) -> None:
        """Writes buffered text. Text that cannot be written is discarded."""
        self.flush()
        if self._has_failed:
            silence(self._stream)

    def _encodable(self, text: str) -> str:
        encoding = self._stream.encoding or "ascii"
        try:
            text.encode(encoding, self._stream.errors or "strict")
        except UnicodeEncodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._is_gone:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            first, self._has_failed = not self._has_failed, True
            if not isinstance(error, OSError) or error.errno in _PERMANENT_ERRORS:
                self._is_gone = True
                silence(self._stream)
            if first:
                self._lost(error)


@contextmanager
def lasting_output(consequence: str) -> Iterator[None]:
    """A context in which writing to `sys.stdout` and `sys.stderr` never raises an error.

    When stdout fails for the first time, one line on stderr says so, followed by `consequence`.
    """
    _open_descriptors()
    before = sys.stdout, sys.stderr

    def lost(error: BaseException) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        print(f"stdout is lost ({reason}): {consequence}", file=sys.stderr, flush=True)

    with open(os.devnull, "w", encoding="utf-8") as null:
        streams = _LastingStream(before[0] or null, lost), _LastingStream(before[1] or null, lambda _: None)
        sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
        try:
            yield
        finally:
            for stream in streams:
                stream.end()
            sys.stdout, sys.stderr = before
