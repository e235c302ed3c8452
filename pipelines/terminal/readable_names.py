"""Readable names of classes, such as "tench" for n01440764, from the tables that come with timm, if it is installed."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["readable_names"]

_SYNSET: Final = re.compile(r"n\d{8}")
_TABLE: Final = "data/_info/imagenet_synset_to_lemma.txt"  # in timm: "n01440764<tab>tench, Tinca tinca"


def readable_names(classes: Sequence[str]) -> tuple[str, ...]:
    """A name for each class, in the same order. All names are different.

    A WordNet synset's ID (n01440764) becomes the synset's first words if timm is installed and lists it. If two classes
    would get the same name (ImageNet has two cranes), the ID is added: "crane (n02012849)". Other classes keep their
    names.
    """
    words = _words([name for name in classes if _SYNSET.fullmatch(name)])
    names = [words.get(name, name) for name in classes]
    often = Counter(names)
    return tuple(
        f"{name} ({own})" if name != own and often[name] > 1 else name for name, own in zip(names, classes, strict=True)
    )


def _words(synsets: Sequence[str]) -> dict[str, str]:
    """The first words of each synset that timm lists.

    Its table is read without importing timm, which would take seconds.
    """
    if not synsets:
        return {}
    found = importlib.util.find_spec("timm")
    for folder in (found.submodule_search_locations if found else None) or ():
        try:
            table = (Path(folder) / _TABLE).read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        words = dict(line.split("\t", 1) for line in table.splitlines() if "\t" in line)
        return {synset: words[synset].split(",")[0].strip() for synset in synsets if synset in words}
    return {}
