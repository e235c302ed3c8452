"""Parsing of YAML for configs and settings. Limits on size and depth keep a hostile text from hanging the parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from sdpnet.pipelines.files.small import read_small

__all__ = ["parse_yaml", "read_yaml"]

LARGEST: Final = 1 << 17  # bytes; PyYAML parses as many in about two seconds, and a config has a few thousand
DEEPEST: Final = 32
_MOST_VALUES: Final = 20_000  # including the values that aliases repeat


def read_yaml(path: Path) -> Any:
    """The values in a file. Raises `ValueError` with a message of one line if it is not YAML, and `OSError`."""
    return parse_yaml(read_small(path, LARGEST).decode("utf-8"))


def parse_yaml(text: str) -> Any:
    """The values in a text: dicts, lists, numbers, text, dates and None.

    Raises:
        ValueError: the text is not YAML, too large or nested too deeply. The message is one line.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{len(text):,} characters, more than the {LARGEST:,} that a config may have")
    try:
        values = yaml.safe_load(text)
        count = _count(values, {}, 0)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # besides its own errors, PyYAML raises IndexError and others for tags such as !!int ""
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from None
    if count > _MOST_VALUES:
        raise ValueError(f"over {_MOST_VALUES:,} values, with what aliases repeat")
    return values


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """The number of values in nested values. An alias counts each time, but its values are visited only once."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if depth > DEEPEST:  # an alias that contains itself ends here, too
        raise RecursionError
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known, depth + 1) for item in items)
    return known[id(value)]
