"""Config keys that were renamed. Files, settings and checkpoints with the old names still work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

from sdpnet.pipelines.errors import UserError, printable

__all__ = ["RENAMED", "current_key", "rename_keys", "say_once"]

RENAMED: Final = {
    "data.read_ahead_batches": "data.native.read_ahead_batches",
    "data.hw_decoder_load": "data.dali.hw_decoder_load",
}


def current_key(key: str) -> str:
    """The present name of a dotted key."""
    return RENAMED.get(key, key)


def rename_keys(values: dict[str, Any]) -> Iterator[str]:
    """Moves the values of old keys to the present ones, in place.

    Args:
        values: nested dicts, as YAML gives them.

    Yields:
        A line for the user about each key that was moved.

    Raises:
        UserError: both the old and the present key are set.
    """
    for old, new in RENAMED.items():
        section, name = old.split(".")
        outer = values.get(section)
        if not isinstance(outer, dict) or name not in outer:
            continue
        _, inner, new_name = new.split(".")
        nested = outer.setdefault(inner, {})
        if not isinstance(nested, dict):
            continue  # the new section is not a section; loading reports that
        if new_name in nested:
            raise UserError(f"{old} is the old name of {new}, which is set too; remove {old}")
        nested[new_name] = outer.pop(name)
        yield f"{old} is now {new}"


def say_once(line: str, environment: Mapping[str, str] = os.environ) -> None:
    """Prints a line on stderr, under torchrun in the first process only."""
    if environment.get("RANK", "0") == "0":
        print(printable(line), file=sys.stderr)
