from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdpnet.config.load import load_config
from sdpnet.config.yaml_text import parse_yaml
from sdpnet.pipelines.errors import UserError
from sdpnet.reporting.run_metrics import read_runs

BOMB = "a: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
HOSTILE = [
    *(
        BOMB,
        "seed: &s [*s]",
        "seed: " + "[" * 50_000,
        "seed: " + "{a: " * 50_000,
        "seed: " + "[" * 40 + "]" * 40,
    ),
    *(
        "seed: !!int ''",
        "seed: !!float ''",
        "seed: !!timestamp x",
        "seed: !!bool x",
        "? [a]\n: 1",
    ),
    *(
        "seed: !!python/name:os.system",
        "seed: 2001-99-99",
        "seed: " + "9" * 5000,
        "\0",
        "seed: '" + "x" * 200_000 + "'",
    ),
]


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:20] for text in HOSTILE])
def test_what_would_hang_or_crash_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: not valid YAML: "):
        load_config(str(tmp_path / "config.yaml"))
    with pytest.raises(UserError, match=r"config\.yaml: not a config"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="the value is not valid YAML"):
        load_config("debug", [f"seed={text}"])


@pytest.mark.parametrize("text", ["extends: 5", "extends: [x]", 'extends: "a\\0b"', f"extends: {'e' * 3000}", "a: 1"])
def test_what_is_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError):
        load_config(str(tmp_path / "config.yaml"))


def test_what_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="not valid YAML: 1,099,511,627,776 bytes, more than"):
        load_config(str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="no config"):
        load_config(str(path))


def test_aliases_of_a_plain_config_are_fine() -> None:
    assert parse_yaml("a: &x {b: [1, 2]}\nc: *x\n") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}
