"""Comparison of two lists of classes, by name and order, because a model knows a class only by its number."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["first_difference"]

_SHOWN = 60  # the number of characters of a name that a message shows


def first_difference(saved: Sequence[str], present: Sequence[str]) -> str | None:
    """Names the first difference between two lists of class names.

    Args:
        saved: the classes that a model or a run was trained on. The text calls them "there".
        present: the classes of the data at hand. The text calls them "here".

    Returns:
        Text such as "class 1 is 'bee' there and 'cow' here", or None where the lists are equal.
    """
    hint = " (the same names in another order)" if sorted(saved) == sorted(present) else ""
    for number, (was, now) in enumerate(zip(saved, present, strict=False)):
        if was != now:
            return f"class {number} is {_shown(was)} there and {_shown(now)} here{hint}"
    if len(saved) == len(present):
        return None
    (longer, where) = (saved, "there") if len(saved) > len(present) else (present, "here")
    number = min(len(saved), len(present))
    counts = f"{len(saved)} classes there, {len(present)} here"
    return f"class {number}, {_shown(longer[number])}, is only {where} ({counts})"


def _shown(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}...")
