"""Lists the config keys with their meaning, default and range, or the keys in which two configs differ.

sdpnet config                 every key
sdpnet config optim           one section; or one key: optim.lr
sdpnet config --diff A B      what differs between two configs: names from configs/, .yaml files or runs
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Final

from sdpnet.config.key_reference import Section, as_yaml, sections
from sdpnet.config.load import flat_values, load_config, similar_keys
from sdpnet.flags.config import add_arguments
from sdpnet.pipelines.errors import UserError, nearest
from sdpnet.reporting.output import say

__all__ = ["add_arguments", "run"]

_WIDEST: Final = 100  # columns of text


def run(arguments: argparse.Namespace) -> int:
    if arguments.diff is None:
        width = min(_WIDEST, shutil.get_terminal_size().columns)
        for number, section in enumerate(_chosen(arguments.section)):
            say(*([""] if number else []), *_page(section, width))
    else:
        one, other = arguments.diff
        say(*_differences(one, other, arguments.section))
    return 0


def _chosen(name: str | None) -> list[Section]:
    """The sections to print: all, one with those nested in it, or one that holds a single key."""
    known = sections()
    if name is None:
        return known
    within = [section for section in known if section.name == name or section.name.startswith(f"{name}.")]
    if name and within:
        return within
    keys = {key.name: section for section in known for key in section.keys}
    if name in keys:
        section = keys[name]
        return [Section(section.name, section.summary, tuple(key for key in section.keys if key.name == name))]
    if similar := similar_keys(name):
        raise UserError(f"no config section or key {name!r}: did you mean {' or '.join(map(repr, similar))}?")
    names = [section.name for section in known if section.name]
    raise UserError(f"no config section or key {name!r}: {nearest(name, names if '.' not in name else keys)}")


def _page(section: Section, width: int) -> list[str]:
    lines = _wrapped(f"[{section.name}] {section.summary}" if section.name else section.summary, width, "")
    for key in section.keys:
        lines += ["", f"  {key.name}"]
        for text in (key.meaning, f"default: {key.default}", f"allowed: {key.allowed}"):
            lines += _wrapped(text, width, "      ")
    return lines


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text.replace("`", ""),
        max(width, 40),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _differences(one: str, other: str, section: str | None) -> list[str]:
    """A table: key, value in one config, value in the other."""
    first, second = (dict(flat_values(asdict(load_config(_file(name))))) for name in (one, other))
    if section is not None:
        keys = {key.name for found in _chosen(section) for key in found.keys}
        first = {key: value for key, value in first.items() if key in keys}
    rows = [(key, as_yaml(value), as_yaml(second[key])) for key, value in first.items() if value != second[key]]
    if not rows:
        return [f"{one} and {other} do not differ{f' in {section}' if section else ''}"]
    rows.insert(0, ("key", one, other))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows]


def _file(name: str) -> str:
    """The argument of `load_config` for a config or, by its config.yaml, for a run."""
    own = Path(name) / "config.yaml"
    return str(own) if own.is_file() else name
