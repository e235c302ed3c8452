"""The sections of a checkpoint, with checks of their types and ranges. The shapes of weights are not checked here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor

__all__ = ["VERSION", "defect"]

VERSION: Final = 2
_LARGEST: Final = 2**53
_DEEPEST: Final = 32  # levels of nested sections in a config
_SECTIONS: Final[dict[int, dict[str, type]]] = {
    1: dict.fromkeys(("model", "optimizer", "scaler", "cursor", "order", "evaluation"), dict)
}
_SECTIONS[2] = {**_SECTIONS[1], **dict.fromkeys(("card", "config", "world", "guard"), dict)}


def defect(state: Any) -> str | None:
    """The reason why `state` is not a checkpoint, or None if it is one."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    version = state.get("version", 1)
    if type(version) is not int or version not in _SECTIONS:
        return f"version {version!r:.20}; this program reads versions 1 and {VERSION}"
    for name, kind in _SECTIONS[version].items():
        if not isinstance(state.get(name), kind):
            return f"lacks {name}"
    for section in ("model", "ema"):
        weights = state.get(section)
        if section == "ema" and weights is None:
            continue
        if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
        ):
            return f"{section} is not weights by name"
    for name, is_right in _CHECKS.items():
        if name in state and not is_right(state[name]):
            return f"{name} is not what this program writes"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST)


def _is_cursor(value: Any) -> bool:
    return value.keys() <= {"epoch", "step_in_epoch", "step"} and all(map(_is_count, value.values()))


def _are_facts(value: Any) -> bool:
    """Whether `value` is a mapping from names to numbers and text."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and (isinstance(fact, str) or type(fact) is bool or _is_number(fact))
        for name, fact in value.items()
    )


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and _is_number(v) for k, v in value.items())


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether YAML could hold the value, and it is not nested too deeply."""
    if isinstance(value, Mapping):
        return depth < _DEEPEST and all(isinstance(k, str) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return depth < _DEEPEST and all(_is_plain(item, depth + 1) for item in value)
    return isinstance(value, (str, bool, type(None))) or type(value) in (int, float)


def _is_card(value: Any) -> bool:
    """Checks the parts of a card that training uses. `parse_card` checks the rest when a model is built from it."""
    classes = value.get("classes", ())
    return _is_plain(value) and isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)


def _is_guard(value: Any) -> bool:
    steps = value.get("bad_steps", [])
    return isinstance(steps, list) and all(map(_is_count, steps))


def _is_score(value: Any) -> bool:
    return value is None or (type(value) is float and not math.isinf(value))


_CHECKS: Final[dict[str, Callable[[Any], bool]]] = {
    "cursor": _is_cursor,
    "order": _are_facts,
    "world": _are_facts,
    "data": _are_facts,
    "evaluation": _are_numbers,
    "scaler": _are_numbers,
    "ema_updates": _is_count,
    "guard": _is_guard,
    "card": _is_card,
    "config": _is_plain,
    "threads": lambda value: type(value) is int and 1 <= value <= 1 << 16,
    "score": _is_score,
}
