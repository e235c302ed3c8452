"""What a person sees who types a command wrongly: argparse's usage, and one line with a remedy."""

from __future__ import annotations

import pytest

from sdpnet import cli
from sdpnet.pipelines.terminal.command_line import CommandParser
from sdpnet.preprocess import adopt, build_ffcv, verify
from sdpnet.preprocess import describe as report


def parser() -> CommandParser:
    made = CommandParser("tool")
    made.add_argument("--source", required=True)
    made.add_argument("--out")
    made.add_argument("--kind", choices=["onnx", "torch-export"])
    return made


def last_line(call: object, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        call(arguments)  # type: ignore[operator]
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.startswith("usage: ") and "\x1b" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sorce", "x"], "the following arguments are required: --source (--sorce: did you mean --source?)"),
        (["--source", "x", "--outt=y"], "unrecognized arguments: --outt=y (--outt: did you mean --out?)"),
        (["--source", "x", "--verbose"], "unrecognized arguments: --verbose (--verbose: --help lists the flags)"),
        (["--source", "x", "--ou", "y"], "unrecognized arguments: --ou y (--ou: did you mean --out?)"),
        (
            ["--source", "x", "y\x1b\n"],
            r"unrecognized arguments: y\x1b\n (each value needs its flag: --source, --out, --kind)",
        ),
        (["--source", "x", "--kind", "onx"], "; did you mean 'onnx'?"),
        (["--source", "x", "--", "--outt"], "unrecognized arguments: --"),
        (["--source"], "argument --source: expected one argument"),
        (["--source", "x", "--out", ""], "argument --out: an empty value, as of a variable that is not set"),
        (["--out=", "--source", "x"], "argument --out: an empty value, as of a variable that is not set"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = last_line(parser().parse_args, arguments, capsys)
    assert line.startswith("tool: error: ") and message in line and (line.endswith(message) or "--outt" in arguments)


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (build_ffcv.main, ["--sorce", "x", "--out", "y"], "did you mean --source?"),
        (adopt.main, ["x.beton"], "each value needs its flag: --out, --source, --train, --val, "),
        (build_ffcv.main, ["images", "shards"], "required: --out (each value needs its flag: --out, --source, "),
        (verify.main, ["x", "--quik"], "did you mean --quick?"),
        (report.main, ["x", "--image", "3"], "did you mean --images?"),
        (cli.main, ["trian"], "did you mean 'train'?"),
        (cli.main, ["report", "x", "--html", "y", "--out", "z"], "(--html: --help lists the flags)"),
        (
            cli.main,
            ["report", "x", "--outt", "y"],
            "sdpnet report: error: unrecognized arguments: --outt y (--outt: did you",
        ),
        (cli.main, ["export", "--modle", "x"], "--modle: did you mean --model?"),
        (cli.main, ["export", "--model", "x", "--out", "y", "--format", "onx"], "did you mean 'onnx'?"),
    ],
)
def test_the_commands_have_it(
    call: object, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in last_line(call, arguments, capsys)


@pytest.mark.parametrize("arguments", [["help"], ["help", "sheet"]])
def test_help_is_a_word_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0 and f"usage: {' '.join(['sdpnet', *arguments[1:]])} " in capsys.readouterr().out
