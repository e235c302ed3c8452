"""Every config key has a meaning, a default that is right, and a range that the validation holds."""

from __future__ import annotations

import string
from dataclasses import asdict

import pytest

from sdpnet.config.key_reference import Key, as_yaml, sections
from sdpnet.config.load import flat_values, load_config
from sdpnet.config.options import Config

KEYS = {key.name: key for section in sections() for key in section.keys}
DEFAULTS = dict(flat_values(asdict(Config())))
UPPER = {*string.ascii_uppercase, "`"}
NO_LIMITS = {"seed", "data.sampling.subset_seed", "augment.randaugment.magnitude"}  # whose limits are in their meaning


def test_every_key_of_a_config_is_there_once() -> None:
    listed = [key.name for section in sections() for key in section.keys]
    assert sorted(listed) == sorted(DEFAULTS)
    names = [section.name for section in sections()]
    assert names[:3] == ["", "model", "data"] and "augment.randaugment" in names and len(set(names)) == len(names)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_key_has_a_meaning_a_default_and_what_is_allowed(key: Key) -> None:
    assert key.meaning.endswith((".", ".)")) and key.meaning[0] in UPPER, "a sentence"
    assert key.allowed and key.default == as_yaml(DEFAULTS[key.name])
    if "number" in key.allowed and key.name not in NO_LIMITS:
        assert ":" in key.allowed, "a number has a range"


def test_every_section_says_what_it_is_about() -> None:
    for section in sections():
        assert section.summary and section.summary[0].isupper() and "Section `" not in section.summary


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("optim.lr", "a number: above 0"),
        ("optim.name", "adamw, muon or nadamuon"),
        ("model.dim", "null or a whole number: at least 1, at most 131,072"),
        ("model.name", "one of sdpnet_tiny, sdpnet_l, sdpnet_xl, sdpnet_xxl"),
        ("data.order", "random or blocks"),  # the plan knows a third, for evaluation alone
        ("data.prefetch_batches", "1 to 4,096, or auto"),
        ("data.crop.scale", "2 numbers: 0 < low <= high <= 1"),
        ("train.compile", "auto, true or false"),
        ("train.micro_batch", "auto, null or at least 1"),
        ("loss.target_threshold", "null or a number: in [0, 1)"),
        ("data.path", "text"),
    ],
)
def test_what_is_allowed_is_what_the_validation_says(name: str, allowed: str) -> None:
    assert KEYS[name].allowed == allowed


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_the_default_can_be_set_as_it_is_printed(key: Key) -> None:
    config = load_config("debug", ["train.epochs=10", f"{key.name}={key.default}"])
    value = dict(flat_values(asdict(config)))[key.name]
    assert as_yaml(value) == key.default


def test_meanings_name_only_keys_that_there_are() -> None:
    names = {section.name for section in sections()}
    words = [word for key in KEYS.values() for word in key.meaning.split("`")[1::2]]
    named = {
        word for word in words if word.split(".")[0] in names and "." in word and not word.endswith(".safetensors")
    }
    assert {"data.image_size", "train.epochs"} <= named <= set(KEYS)
