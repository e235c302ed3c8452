"""What classes are called for people: "tench" for n01440764, from the tables that timm brings along, if it is there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from pipelines.errors import printable

__all__ = ["readable_names"]

_SYNSET = re.compile(r"n\d{8}")


def readable_names(classes: Sequence[str]) -> tuple[str, ...]:
    """A name of one line for each class, in their order and each different from the others.

    A WordNet synset's ID (n01440764) becomes the synset's first words where timm is installed and knows it; where two
    classes would have one name (ImageNet has two cranes), the ID follows: "crane (n02012849)". All else keeps its name.
    """
    words = _words([name for name in classes if _SYNSET.fullmatch(name)])
    names = [words.get(name, name) for name in classes]
    often = Counter(names)
    return tuple(
        printable(f"{name} ({own})" if name != own and often[name] > 1 else name)
        for name, own in zip(names, classes, strict=True)
    )


def _words(synsets: Sequence[str]) -> dict[str, str]:
    """The first words of each synset that timm knows."""
    if not synsets:
        return {}
    try:
        from timm.data import ImageNetInfo  # takes a second or two

        known = ImageNetInfo()
    except Exception:  # not installed, or it cannot be imported here: IDs are names too
        return {}
    words = {}
    for synset in synsets:
        with suppress(KeyError):
            words[synset] = known.label_name_to_description(synset).split(",")[0].strip()
    return words
