"""Lines on stdout: whatever the terminal's encoding, at once, and with a reason where they cannot be written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sdpnet.pipelines.errors import printable

__all__ = ["say", "say_json"]


def say(*lines: str) -> None:
    """Prints lines; what in them would act on a terminal, or has no place in its encoding, is escaped.

    Raises `OSError` that names standard output: `BrokenPipeError` when its reader has gone, others for a full disk.
    After that, stdout leads nowhere, so that Python's end does not fail on it once more.
    """
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(printable(line).encode(encoding, "backslashreplace").decode(encoding) for line in lines)
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError, ValueError):  # a test's stdout is no file
            descriptor = sys.stdout.fileno()
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)
        raise OSError(error.errno, error.strerror, "standard output") from error


def say_json(facts: Mapping[str, Any]) -> None:
    """Prints one JSON object on one line, in ASCII without control characters, as `say` does."""
    say(json.dumps(facts).replace("\x7f", "\\u007f"))
