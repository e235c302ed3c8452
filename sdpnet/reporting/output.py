"""Lines on stdout, in any encoding of the terminal, without delay, and with a clear error if they cannot be written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sdpnet.pipelines.errors import STDOUT, printable

__all__ = ["say", "say_json"]


def say(*lines: str) -> None:
    """Prints lines. Control characters, and characters that the terminal's encoding does not have, are escaped.

    Raises:
        OSError: standard output cannot be written; the error names it. It is a `BrokenPipeError` if the reader has
            closed it. From then on stdout is redirected to the null device, because Python would otherwise fail again
            when it flushes stdout at its exit.
    """
    if not lines:
        return
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(printable(line).encode(encoding, "backslashreplace").decode(encoding) for line in lines)
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError, ValueError):  # in tests, stdout is not a file
            descriptor = sys.stdout.fileno()
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)
        raise OSError(error.errno, error.strerror, STDOUT) from error


def say_json(facts: Mapping[str, Any]) -> None:
    """Prints one JSON object on one line, in ASCII without control characters. Raises as `say` does."""
    say(json.dumps(facts).replace("\x7f", "\\u007f"))
