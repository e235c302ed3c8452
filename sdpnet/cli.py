"""The `sdpnet` command and its commands, from `sdpnet convert` to `sdpnet doctor`.

The flags of a command are in a module that imports nothing slow, so that `--help` and mistakes are answered at once.
The module that does the work is imported when the flags are known to be right.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Final, NamedTuple

from sdpnet import __version__
from sdpnet.pipelines.errors import BackendMissingError, run_command
from sdpnet.pipelines.lasting_output import open_standard_streams
from sdpnet.pipelines.terminal.command_line import CommandParser, parse, run_parsed
from sdpnet.pipelines.terminal.remedy import missing_package

__all__ = ["COMMANDS", "STEP", "Command", "main", "top_parser", "train"]


class Command(NamedTuple):
    """One command.

    Attributes:
        flags: the module with `add_arguments`.
        module: the module with `run`.
        purpose: what the command does, as a part of a sentence.
        without_torch: the module with `run` where torch is missing or broken; "" for the same one.
    """

    flags: str
    module: str
    purpose: str
    without_torch: str = ""


_PREPROCESS: Final = "sdpnet.preprocess"
_OURS: Final = "sdpnet.commands"


def _command(
    name: str, purpose: str, place: str = _OURS, flags: str = "sdpnet.flags", without_torch: str = ""
) -> Command:
    return Command(f"{flags}.{name}", f"{place}.{name}", purpose, without_torch)


def _preprocess(name: str, purpose: str) -> Command:
    return _command(name, purpose, _PREPROCESS, f"{_PREPROCESS}.flags")


COMMANDS: Final = {
    "convert": _preprocess("convert", "convert images into a shard set"),
    "adopt": _preprocess("adopt", "make a shard set of images where they lie, or of FFCV's files"),
    "verify": _preprocess("verify", "check a shard set from end to end"),
    "describe": _preprocess("describe", "show what is in a shard set, as text and as a page"),
    "train": _command("train", "train a model", "sdpnet"),
    "evaluate": _command("evaluate", "score a model on a shard set"),
    "predict": _command("predict", "name what is in some images"),
    "report": _command("report", "draw the curves of one or more runs, and compare them"),
    "export": _command("export", "write a finished model as ONNX or as an exported PyTorch program"),
    "lab": _command("lab", "compare variants of a config, with standard errors"),
    "sheet": _command("sheet", "draw a training batch as the model gets it"),
    "bench": Command(
        "sdpnet.pipelines.benchmarks.flags",
        "sdpnet.pipelines.bench",
        "time the pipelines; bench step: the training step",
    ),
    "doctor": _command(
        "doctor",
        "say what is installed, and what limits training on this machine",
        without_torch=f"{_OURS}.installation",
    ),
    "config": _command("config", "list the config keys, or what differs between two configs"),
    "completion": _command("completion", "print the script for completion in a shell", "sdpnet"),
}
STEP: Final = Command("sdpnet.flags.bench_step", "sdpnet.benchmarks.step", "time the training step, part by part")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if words[:2] == ["bench", "step"]:
        return _run("bench step", STEP, words[2:])
    if words and words[0] in COMMANDS:
        return _run(words[0], COMMANDS[words[0]], words[1:])
    top_parser()[0].parse_args(words)
    raise AssertionError(f"{words}: no command, so the parser has ended the process")


def top_parser() -> tuple[CommandParser, dict[str, CommandParser]]:
    """The parser of `sdpnet` itself and the parsers of its commands, which have no flags yet."""
    parser = CommandParser(prog="sdpnet", description="Trains SdP-Net fast, from shards of images.")
    parser.add_argument("--version", action="version", version=f"sdpnet {__version__}")
    parser.epilog = "sdpnet COMMAND --help lists the flags of a command."
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    return parser, {name: commands.add_parser(name, help=command.purpose) for name, command in COMMANDS.items()}


def train() -> int:
    """`sdpnet train`, as the program `train` of a checkout."""
    return main(["train", *sys.argv[1:]])


def _run(name: str, command: Command, words: list[str]) -> int:
    add_arguments = _load(command.flags).add_arguments
    description = f"{command.purpose[0].upper()}{command.purpose[1:]}."
    arguments = parse(f"sdpnet {name}", description, add_arguments, words)
    return run_parsed(arguments, _load(command.module, command.without_torch).run)


def _load(module: str, without_torch: str = "") -> ModuleType:
    """Imports a module, or the other one if torch is missing or broken.

    If any other package of an extra is missing or broken, the process ends with one line.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = missing_package(error)
        if reason is None:
            raise
        if without_torch and reason.startswith("torch "):
            return importlib.import_module(without_torch)

    def fail() -> None:
        raise BackendMissingError(reason)

    sys.exit(run_command(fail))


if __name__ == "__main__":
    sys.exit(main())
