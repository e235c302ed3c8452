"""Every config key with its meaning, default and range, read from the dataclasses of `sdpnet.config.options`.

`sdpnet config` and the reference page of the documents print what this module returns.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final, Literal

from sdpnet.config.options import Config, ModelConfig
from sdpnet.model.options import ModelOptions
from sdpnet.pipelines.errors import UserError

__all__ = ["Key", "Section", "as_yaml", "sections"]

_SHARED: Final = {ModelConfig: ModelOptions}  # the docstring of the value has meanings that the key's does not have
_FAR_BELOW: Final = -(10**9)  # a whole number below every range
_NO_NAME: Final = "?"  # similar to no name of a model, so that the message lists all names


@dataclass(frozen=True)
class Key:
    """One config key.

    Attributes:
        name: The dotted name, as `--set` accepts it: "data.crop.scale".
        meaning: The effect of the key, in sentences with names in backticks.
        default: The default as YAML.
        allowed: The choices, or the type and the range, in words.
    """

    name: str
    meaning: str
    default: str
    allowed: str


@dataclass(frozen=True)
class Section:
    """One section of a config: its dotted name ("" is the top level), a summary, and its own keys."""

    name: str
    summary: str
    keys: tuple[Key, ...]


def sections() -> list[Section]:
    """All sections of a config, each followed by the ones nested in it, in the order of the dataclasses."""
    return list(_sections(Config(), "", Config()))


def as_yaml(value: Any) -> str:
    """A value as it is written in a config file or after `--set KEY=`; six digits of a number are shown."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(as_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) or '""'


def _sections(options: Any, where: str, config: Config) -> Iterator[Section]:
    cls = type(options)
    hints, meanings = typing.get_type_hints(cls), _meanings(cls)
    nested = {field.name for field in fields(cls) if is_dataclass(getattr(options, field.name))}
    keys = []
    for field in fields(cls):
        if field.name not in nested:
            key, value = f"{where}.{field.name}".lstrip("."), getattr(options, field.name)
            allowed = _allowed(hints[field.name], key, config)
            keys.append(Key(key, meanings.get(field.name, ""), as_yaml(value), allowed))
    summary = re.sub(r"^Section `[\w.]+`( of a config)?: ", "", (inspect.getdoc(cls) or "").split("\n\n")[0])
    yield Section(where, " ".join((summary[:1].upper() + summary[1:]).split()), tuple(keys))
    for field in fields(cls):
        if field.name in nested:
            yield from _sections(getattr(options, field.name), f"{where}.{field.name}".lstrip("."), config)


def _meanings(cls: type) -> dict[str, str]:
    """The entries under "Attributes:" in a class's docstring, each on one line."""
    found = _meanings(_SHARED[cls]) if cls in _SHARED else {}
    _, _, listed = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")
    listed = re.split(r"\n(?=\S)", listed)[0]  # without the text after the list
    for entry in re.split(r"^ {4}(?=\w+: )", listed, flags=re.MULTILINE)[1:]:
        name, _, meaning = entry.partition(": ")
        found[name] = " ".join(meaning.split())
    return found


def _allowed(hint: Any, key: str, config: Config) -> str:
    """The allowed values of a key, in words."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words = [word for member in members if typing.get_origin(member) is Literal for word in typing.get_args(member)]
    words = [word for word in words if not _refusal(word, key, config)]  # some words are for internal use by evaluation
    if bool in members:
        words += ["true", "false"]
    if type(None) in members:
        words.append("null")
    kinds = [_kind(member) for member in members if _kind(member)]
    if not kinds:
        return _listed(words)
    limits = _refusal(_probe(members), key, config)
    # Limits that name the words themselves ("auto, null or at least 1") need no list of words before them.
    if (kinds[0] == "text" and limits) or any(str(word) in re.findall(r"\w+", limits) for word in words):
        return limits
    return _listed([*words, f"{kinds[0]}: {limits}" if limits else kinds[0]])


def _listed(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        numbers = typing.get_args(hint)
        if numbers[-1] is Ellipsis:
            return "a list of names"
        return f"{len(numbers)} {'whole ' if numbers[0] is int else ''}numbers"
    return {int: "a whole number", float: "a number", str: "text"}.get(hint, "")


def _probe(members: tuple[Any, ...]) -> Any:
    """A value of the key's type that is outside of every range."""
    for member in members:
        if typing.get_origin(member) is tuple and typing.get_args(member)[-1] is not Ellipsis:
            return (_FAR_BELOW,) * len(typing.get_args(member))
        if member in (int, float):
            return member(_FAR_BELOW)
        if member is str:
            return _NO_NAME
    return None


def _refusal(value: Any, key: str, config: Config) -> str:
    """The allowed values that the validation names when it refuses `value`; "" if it accepts `value`.

    A range is thus written only once, in the check itself, and the documents cannot disagree with it.
    """
    try:
        _replaced(config, key.split("."), value)
    except UserError as error:
        refused, separator, allowed = str(error).partition(": must be ")
        if separator and refused.startswith(f"{key} = "):
            return allowed
        _, _, names = str(error).partition(": there are ")
        return f"one of {names}" if names else ""
    return ""


def _replaced(options: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return replace(options, **{name: _replaced(getattr(options, name), rest, value) if rest else value})
