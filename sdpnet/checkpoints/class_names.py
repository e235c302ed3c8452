"""Whether two lists of classes are the same: by name and order, because a model knows its classes by their number."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["first_difference"]

_SHOWN = 60  # characters of a name


def first_difference(there: Sequence[str], here: Sequence[str]) -> str | None:
    """Where two lists of class names first differ ("class 1 is 'bee' there and 'cow' here"); None where they do not."""
    hint = " (the same names in another order)" if sorted(there) == sorted(here) else ""
    for number, (was, now) in enumerate(zip(there, here, strict=False)):
        if was != now:
            return f"class {number} is {_shown(was)} there and {_shown(now)} here{hint}"
    if len(there) == len(here):
        return None
    (longer, where) = (there, "there") if len(there) > len(here) else (here, "here")
    number = min(len(there), len(here))
    return f"class {number}, {_shown(longer[number])}, is only {where} ({len(there)} classes there, {len(here)} here)"


def _shown(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else f"{name[: _SHOWN - 3]}...")
