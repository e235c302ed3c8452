"""Configs: YAML files become frozen, validated dataclasses. A mistake is reported in one line with the remedy.

    seed: 0
    model: {name: sdpnet_xl, dropout: 0.2}
    optim: {lr: 1e-3}
    ...

`sdpnet.config.options.Config` defines the sections and their keys; those for data and augmentation come from
`sdpnet.pipelines.options`. A file may start from another one with `extends: NAME`. Keys of earlier versions still work
(`sdpnet.config.renamed_keys`), so that older runs can be continued. Values that follow from others (the scaled learning
rate, the number of steps) are computed where they are needed and are not part of a config.
"""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import yaml

from sdpnet.config.names import CONFIG_DIRECTORY, config_names
from sdpnet.config.options import Config
from sdpnet.config.renamed_keys import current_key, rename_keys, say_once
from sdpnet.config.yaml_text import parse_yaml, read_yaml
from sdpnet.pipelines.errors import UserError, nearest, require

__all__ = ["absolute_paths", "dump_config", "flat_values", "load_config", "section_from", "similar_keys"]

PATH_KEYS: Final = (
    "data.path",
    "data.sampling.classes",
    "data.sampling.exclude",
    "data.sampling.subset",
    "data.sampling.weights",
    "data.sampling.labels",
    "data.sampling.val_labels",
    "train.start_from",
)
_LISTS: Final = (".npy", ".txt")  # where other values than paths are possible, the suffix says what is a path
LARGEST_FLOAT: Final = 3.4028234663852886e38  # the largest float32; a larger value would be infinite on the device
WHOLE_NUMBERS: Final = range(-(2**63), 2**63)  # signed 64 bits; only the seed may be unsigned
_LONGEST_CHAIN: Final = 20
_Section = TypeVar("_Section")
SEEDS: Final = range(-(2**63), 2**64)  # the values that torch.manual_seed accepts


def load_config(name: str, settings: Iterable[str] = ()) -> Config:
    """Loads a config and applies settings to it.

    Args:
        name: the name of a config (a file in `configs/`) or the path of a .yaml file.
        settings: texts "section.key=value", which are applied in their order.

    Raises:
        UserError: the config does not exist or is not YAML, a key is unknown (the message names the nearest one), or a
            value has the wrong type or is out of range. Whole numbers must have at most 64 bits, and other numbers must
            be finite in float32.
    """
    values = _read(name, ())
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting[:200]}: must look like section.key=value")
        target = values
        if (current := current_key(key.strip())) != key.strip():
            say_once(f"--set {setting[:200]}: {key.strip()} is now {current}")
        *sections, last = current.split(".")
        for section in sections:
            nested = target.setdefault(section, {})
            if not isinstance(nested, dict):
                raise UserError(f"--set {setting[:200]}: {section} is no section")
            target = nested
        try:
            target[last] = parse_yaml(text)
        except ValueError:
            raise UserError(f"--set {setting[:200]}: the value is not valid YAML") from None
    for line in rename_keys(values):  # of whole sections, as in --set data={...}
        say_once(f"--set: {line}")
    _refuse_misplaced(values)
    return _build(Config, values, "")


def dump_config(config: Config) -> str:
    """The config as YAML, with all keys. `load_config` makes an equal config of it."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False)


def similar_keys(name: str) -> list[str]:
    """The dotted config keys that a name without its section may stand for, such as optim.lr for lr; often none."""
    last = name.rpartition(".")[2]
    ends: dict[str, list[str]] = {}
    for key, _ in flat_values(asdict(Config())):
        ends.setdefault(key.rpartition(".")[2], []).append(key)
    return ends.get(last) or [key for end in get_close_matches(last, ends, n=1, cutoff=0.8) for key in ends[end]]


def _refuse_misplaced(values: Mapping[str, Any]) -> None:
    """Raises `UserError` for a key that its section does not have, but another one."""
    known = {key for key, _ in flat_values(asdict(Config()))}
    within = {key[:dot] for key in known for dot in range(len(key)) if key[dot] == "."} | {""}
    for key, _ in flat_values(values):
        section = key.rpartition(".")[0]
        if key in known | within or section not in within:
            continue
        siblings = [other.removeprefix(f"{section}.") for other in known if other.rpartition(".")[0] == section]
        if get_close_matches(key.rpartition(".")[2], siblings, n=1, cutoff=0.5):
            continue  # `_build` names the nearest one in the same section
        if others := similar_keys(key):
            raise UserError(
                f"unknown config key {str(_shortened(key))!r}: did you mean {' or '.join(map(repr, others))}?"
            )


def section_from(cls: type[_Section], values: Mapping[str, Any], where: str) -> _Section:
    """Makes the dataclass of a config section from values that are checked as those of a config file are.

    Args:
        cls: the dataclass, such as `DataOptions`.
        values: the section's keys and values; nested sections are mappings.
        where: the section's name in messages.

    Raises:
        UserError: a key is unknown, or a value has the wrong type or is out of range.
    """
    section: _Section = _build(cls, values, where)
    return section


def absolute_paths(config: Config) -> Config:
    """The config with absolute paths (and `~` expanded), so that they are valid in any working directory.

    Symbolic links are not resolved: if the target of a link is moved and the link updated, the config stays valid.
    """
    for key in PATH_KEYS:
        config = _with_absolute(config, key.split("."))
    return config


def _with_absolute(options: Any, key: list[str]) -> Any:
    name, *rest = key
    value = getattr(options, name)
    if rest:
        return replace(options, **{name: _with_absolute(value, rest)})
    if isinstance(value, tuple):
        return replace(options, **{name: tuple(_absolute(item) if item.endswith(_LISTS) else item for item in value)})
    is_path = isinstance(value, str) and value and (name in ("path", "start_from") or value.endswith(_LISTS))
    return replace(options, **{name: _absolute(value)}) if is_path else options


def _absolute(path: str) -> str:
    return str(Path.cwd() / os.path.expanduser(path))  # not abspath: "link/.." need not be "."


def flat_values(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value of nested sections with its dotted key."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_values(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def _read(name: str, chain: tuple[Path, ...]) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIG_DIRECTORY / f"{name}.yaml"
    if len(chain) > _LONGEST_CHAIN:
        raise UserError(f"{chain[0]}: extends more than {_LONGEST_CHAIN} configs in a row")
    if not _is_file(path):
        raise UserError(f"no config {name!r}: {nearest(name, config_names())} (or pass the path of a .yaml file)")
    if path in chain:
        raise UserError(f"{path}: extends itself")
    try:
        values = read_yaml(path) or {}
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be sections of keys and values, not {type(values).__name__}")
    try:
        for line in rename_keys(values):
            say_once(f"{path}: {line}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    base = values.pop("extends", None)
    if base is not None and not (isinstance(base, str) and "\0" not in base):
        raise UserError(f"{path}: extends = {_shortened(base)!r}: must be the name or path of a config")
    return values if base is None else _merge(_read(base, (*chain, path)), values)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or has a null byte
        return False


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        nested = base.get(key)
        base[key] = _merge(nested, value) if isinstance(nested, dict) and isinstance(value, dict) else value
    return base


def _build(cls: Any, values: Any, where: str) -> Any:
    """Makes an instance of the dataclass `cls` from `values` (parsed YAML). `where` is its key, for messages."""
    if not isinstance(values, Mapping):
        keys = ", ".join(f.name for f in fields(cls))
        raise UserError(f"{where or 'config'} = {_shortened(values)!r}: must be a section with the keys {keys}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    arguments = {}
    for key, value in values.items():
        name = str(_shortened(key))
        full = f"{where}.{name}" if where else name
        if key not in known:
            raise UserError(f"unknown config key {full!r}: {nearest(name, known)}")
        arguments[key] = _convert(hints[key], value, full)
    missing = [
        n for n, f in known.items() if n not in arguments and f.default is MISSING and f.default_factory is MISSING
    ]
    assert not missing, f"{cls.__name__} has required fields: {missing}"
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return value if type(value) is hint else _build(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        *others, last = (a for a in arguments if a is not type(None))
        if last is str:  # a number or a path; YAML 1.1 parses 1e-2, which is a number, as text
            return _convert(last if isinstance(value, str) and not _is_number(value) else others[0], value, where)
        words = [word for a in others for word in typing.get_args(a)]  # the values of the Literals before the last type
        if words and isinstance(value, str):
            return _convert(Literal[tuple(words)], value, where)
        return _convert(last, value, where)
    if origin is Literal:
        if value is False and "off" in arguments:
            return "off"  # YAML 1.1 parses an unquoted off as false
        if value not in arguments:
            shown = _shortened(value)
            raise UserError(f"{where} = {shown!r}: {nearest(str(shown), [str(a) for a in arguments])}")
        return value
    if origin is tuple and arguments[-1] is Ellipsis:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} = {_shortened(value)!r}: must be a list of names, as in [a, b]")
        texts = (str(item) if type(item) in (int, float) else item for item in value)
        return tuple(_convert(arguments[0], item, where) for item in texts)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise UserError(f"{where} = {_shortened(value)!r}: must be a list of {len(arguments)} numbers")
        return tuple(_convert(a, item, where) for a, item in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        number = None
        try:
            number = float(value)  # YAML 1.1 parses 1e-5, which has no point, as text
        except OverflowError:
            number = math.inf
        except ValueError:
            pass
        if number is not None:
            # A comparison with NaN is false, so NaN is refused too.
            require(abs(number) <= LARGEST_FLOAT, where, _shortened(value), "a finite number (at most 3.4e38)")
            return number
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        allowed = SEEDS if where == "seed" else WHOLE_NUMBERS
        require(value in allowed, where, _shortened(value), "a whole number of at most 64 bits")
        return value
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
    raise UserError(f"{where} = {_shortened(value)!r}: must be {wanted}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shortened(value: Any) -> Any:
    """The value for a message, without the middle where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = hex(value)
    return value if len(text) <= 80 else f"{text[:12]}...{text[-4:]}"
