"""Lines on stdout: whatever the terminal's encoding, at once, and with a reason where they cannot be written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pipelines.errors import printable

__all__ = ["say", "say_json"]


def say(line: str, *, flush: bool = True) -> None:
    """Prints one line; what would act on a terminal, or has no place in its encoding, is escaped.

    Raises `OSError` that names standard output: `BrokenPipeError` when its reader has gone, others for a full disk.
    After that, stdout leads nowhere, so that Python's end does not fail on it once more.
    """
    encoding = sys.stdout.encoding or "utf-8"
    text = printable(line).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=flush)
    except OSError as error:
        with suppress(OSError, ValueError):  # a test's stdout is no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise OSError(error.errno, error.strerror, "standard output") from error


def say_json(facts: Mapping[str, Any], *, flush: bool = True) -> None:
    """Prints one JSON object on one line, in ASCII without control characters, as `say` does."""
    say(json.dumps(facts).replace("\x7f", "\\u007f"), flush=flush)
