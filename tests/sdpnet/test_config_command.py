"""`sdpnet config`: the keys with their meanings, and what differs between two configs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from command_output import one_line

from sdpnet import cli
from sdpnet.config.key_reference import sections
from sdpnet.config.load import dump_config, flat_values, load_config


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_all_keys_with_meaning_default_and_range(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    text = printed(capsys)
    assert all(len(line) <= 90 for line in text.splitlines()) and "`" not in text
    flat = " ".join(text.split())
    for section in sections():
        assert f"[{section.name}]" in flat or not section.name
        for key in section.keys:
            meaning, allowed = (" ".join(words.replace("`", "").split()) for words in (key.meaning, key.allowed))
            assert f"{key.name} {meaning} default: {key.default} allowed: {allowed}" in flat


def test_a_section_has_those_nested_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "augment")
    assert "augment.mean" in text and "augment.mix.cutmix_alpha" in text and "optim" not in text
    assert "augment.mean" not in printed(capsys, "augment.mix")
    one = printed(capsys, "optim.lr")
    assert "optim.lr\n" in one and "default: 0.001" in one and "optim.eps" not in one


@pytest.mark.parametrize(
    ("name", "near"), [("optin", "'optim'"), ("optim.lrr", "'optim.lr'"), ("data.crops", "'data.crop")]
)
def test_an_unknown_section(name: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(cli.main(["config", name]), capsys, f"no config section or key {name!r}: did you mean {near}")


def test_the_difference_of_two_configs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = (dict(flat_values(asdict(load_config(name)))) for name in ("sdpnet_xl", "modern/sdpnet_xl"))
    header, *rows = printed(capsys, "--diff", "sdpnet_xl", "modern/sdpnet_xl").splitlines()
    assert header.split() == ["key", "sdpnet_xl", "modern/sdpnet_xl"]
    assert [row.split()[0] for row in rows] == [key for key in first if first[key] != second[key]]
    assert "optim.schedule" in {row.split()[0] for row in rows}
    *_, row = printed(capsys, "optim", "--diff", "sdpnet_xl", "modern/sdpnet_xl").splitlines()
    assert row.split() == ["optim.warmup_epochs", "5", "20"]
    assert printed(capsys, "--diff", "demo", "demo") == "demo and demo do not differ\n"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config("demo", ["optim.lr=0.5", "data.path=x"])))
    lines = printed(capsys, "--diff", "demo", str(run)).splitlines()
    assert [line.split() for line in lines[1:]] == [["data.path", '""', "x"], ["optim.lr", "0.003", "0.5"]]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    one_line(
        cli.main(["config", "--diff", "demo", "sdpnet_x"]), capsys, "no config 'sdpnet_x'", "did you mean 'sdpnet_xl'"
    )
