"""Names for people, where the tables know them."""

from __future__ import annotations

import sys

import pytest

from pipelines.readable_names import readable_names

CRANES = ("n02012849", "n03126707")  # a bird and a machine


def test_synsets_have_words() -> None:
    timm_data = pytest.importorskip("timm.data")
    classes = ("n01440764", "cow", *CRANES, "n00000000", "n0144076", "cat\x1b[2J")
    names = ("tench", "cow", "crane (n02012849)", "crane (n03126707)", "n00000000", "n0144076", r"cat\x1b[2J")
    assert readable_names(classes) == names
    assert readable_names(("n02127052", "lynx")) == ("lynx (n02127052)", "lynx")  # a folder may have that name
    theirs = timm_data.ImageNetInfo()
    synsets = theirs.label_names()
    names = readable_names(synsets)
    assert len(set(names)) == 1000
    for name, synset in zip(names, synsets, strict=True):
        words = theirs.label_name_to_description(synset).split(",")[0]
        assert name in (words, f"{words} ({synset})")


def test_without_timm_classes_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert readable_names(("n01440764", "cow")) == ("n01440764", "cow")


def test_names_of_other_sets_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert readable_names(("airplane", "automobile")) == ("airplane", "automobile")
