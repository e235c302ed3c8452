from __future__ import annotations

import pytest

from sdpnet import train
from sdpnet.commands import sheet
from sdpnet.config.load import load_config
from sdpnet.config.setting import add_settings, text_setting
from sdpnet.pipelines.terminal.command_line import CommandParser


@pytest.mark.parametrize(
    "text", ["[red]x", "1", "a: b", "~", "", 'it\'s "\\"', " x\n\x1b[2J", "猫 😀", "caf\udce9", "# no"]
)
def test_a_setting_that_is_text_stays_that_text(text: str) -> None:
    assert load_config("debug", [text_setting("data.path", text)]).data.path == text


def parser() -> CommandParser:
    made = CommandParser("tool")
    made.add_argument("--data")
    made.add_argument("--many", nargs="+")
    made.add_argument("--two", nargs=2)
    made.add_argument("--resume", action="store_true")
    add_settings(made)
    return made


@pytest.mark.parametrize(
    ("words", "settings", "others"),
    [
        ("", [], {}),
        ("a.b=1", ["a.b=1"], {}),
        ("a.b=1 --resume seed=2 --data x c=3", ["a.b=1", "seed=2", "c=3"], {"resume": True, "data": "x"}),
        ("--set a=1 b=2 --set c=3 a=4", ["a=1", "b=2", "c=3", "a=4"], {}),
        ("--set=a=1 b=2", ["a=1", "b=2"], {}),
        ("--data a=1 --data=b=2 c=3", ["c=3"], {"data": "b=2"}),
        ("--many a=1 b=2 --resume c=3", ["c=3"], {"many": ["a=1", "b=2"], "resume": True}),
        ("--two a=1 b=2 c=3", ["c=3"], {"two": ["a=1", "b=2"]}),
        ("a.b=x=y a.c= d=[1,-2]", ["a.b=x=y", "a.c=", "d=[1,-2]"], {}),
    ],
)
def test_a_setting_needs_no_flag(words: str, settings: list[str], others: dict[str, object]) -> None:
    found = vars(parser().parse_args(words.split()))
    assert found.pop("set") == settings
    assert {key: value for key, value in found.items() if value not in (None, False)} == others
    assert parser().parse_args([]).set == [], "no call sees another's"


@pytest.mark.parametrize("word", ["seed", "=1", "a b=1", "1a=2", "a..b=1", "./x=1"])
def test_a_word_that_is_no_setting_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--resume", word])
    assert f"unrecognized arguments: {word}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser().parse_args(["--", "a=1"])


@pytest.mark.parametrize("command", [train, sheet])
def test_the_commands_take_settings_so(command: object) -> None:
    """In a parser of its own and below another, as in `sdpnet COMMAND`."""
    whole = CommandParser("sdpnet")
    below = whole.add_subparsers(dest="command").add_parser("it")
    command.add_arguments(below)  # type: ignore[attr-defined]
    found = whole.parse_args(["it", "optim.lr=1", "--out", "x.png", "seed=3", "--set", "seed=4"])
    assert found.set == ["optim.lr=1", "seed=3", "seed=4"] and str(found.out) == "x.png"
    assert "--set may be left out" in " ".join(below.format_help().split())
