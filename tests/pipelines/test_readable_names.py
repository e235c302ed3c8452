"""Names for people, where the tables know them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conversion import write_manifest

from sdpnet.commands.sheet import augmented_batch
from sdpnet.config.load import load_config
from sdpnet.pipelines.terminal.readable_names import readable_names
from sdpnet.preprocess import describe as report

CRANES = ("n02012849", "n03126707")  # a bird and a machine


def test_synsets_have_words() -> None:
    timm_data = pytest.importorskip("timm.data")
    classes = ("n01440764", "cow", *CRANES, "n00000000", "n0144076")
    names = ("tench", "cow", "crane (n02012849)", "crane (n03126707)", "n00000000", "n0144076")
    assert readable_names(classes) == names
    assert readable_names(("n02127052", "lynx")) == ("lynx (n02127052)", "lynx")  # a folder may have that name
    theirs = timm_data.ImageNetInfo()
    synsets = theirs.label_names()
    names = readable_names(synsets)
    assert len(set(names)) == 1000
    for name, synset in zip(names, synsets, strict=True):
        words = theirs.label_name_to_description(synset).split(",")[0]
        assert name in (words, f"{words} ({synset})")


def test_sheets_and_pages_show_words(shard_set: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    shards = tmp_path / "shards"
    shutil.copytree(shard_set, shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    write_manifest(shards, {**manifest, "classes": ["n01440764", *CRANES]})
    keys = [f"data.path={shards}", "data.pipeline=torchvision", "data.num_workers=1", "data.batch_size_per_gpu=8"]
    keys += ["augment.mix.mixup_alpha=0", "augment.mix.cutmix_alpha=0"]
    _, lines = augmented_batch(load_config("debug", keys), 0, 0)
    words = {"tench", "crane (n02012849)", "crane (n03126707)"}
    assert {of_one[0].split(maxsplit=1)[1] for of_one in lines} <= words
    assert report.main([str(shards), "--images", "2"]) == 0
    text = (shards / "report.html").read_text()
    assert all(text.count(word) >= 2 for word in words) and "n01440764" not in text


def test_without_timm_classes_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert readable_names(("n01440764", "cow")) == ("n01440764", "cow")


def test_names_of_other_sets_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert readable_names(("airplane", "automobile")) == ("airplane", "automobile")
