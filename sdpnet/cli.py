"""The `sdpnet` command: train, evaluate, predict, report, export, lab, sheet, config, doctor; programs of the other
packages."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Final

from sdpnet import __version__
from sdpnet.pipelines.errors import BackendMissingError, run_command
from sdpnet.pipelines.terminal.command_line import CommandParser
from sdpnet.pipelines.terminal.remedy import missing_package

__all__ = ["main"]

# name -> (module with `add_arguments` and `run`, what it does): only the one that is asked for is imported
COMMANDS: Final = {
    "train": ("sdpnet.train", "train a model"),
    "evaluate": ("sdpnet.commands.evaluate", "score a model on a shard set"),
    "predict": ("sdpnet.commands.predict", "name what is in some images"),
    "report": ("sdpnet.commands.report", "draw the curves of one or more runs, and compare them"),
    "export": ("sdpnet.commands.export", "write a finished model as ONNX or as an exported PyTorch program"),
    "lab": ("sdpnet.commands.lab", "compare variants of a config, with standard errors"),
    "sheet": ("sdpnet.commands.sheet", "draw a training batch as the model gets it"),
    "config": ("sdpnet.commands.config", "list the config keys, or what differs between two configs"),
    "doctor": ("sdpnet.commands.doctor", "what is installed, and what limits training on this machine"),
}
# name -> (module with a `main`, what it does): commands of the other packages, which also run by themselves
PROGRAMS: Final = {
    "describe": ("sdpnet.preprocess.describe", "show what is in a shard set"),
    "verify": ("sdpnet.preprocess.verify", "check a shard set from end to end"),
    "bench": ("sdpnet.pipelines.bench", "time the pipelines; bench step: the training step"),
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    asked = argv[0] if argv else ""
    if argv[:2] == ["bench", "step"]:
        return _load("sdpnet.benchmarks.step").main(argv[2:])
    if asked in PROGRAMS:
        return _load(PROGRAMS[asked][0]).main(argv[1:], program=f"sdpnet {asked}")
    parser = CommandParser(prog="sdpnet", description="Trains SdP-Net fast, from shards of images.")
    parser.add_argument("--version", action="version", version=f"sdpnet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, purpose) in {**COMMANDS, **PROGRAMS}.items():
        command = commands.add_parser(name, help=purpose)
        if name == asked:
            implementation = _load(module)
            command.description = (implementation.__doc__ or "").split("\n\n")[0]
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    arguments = parser.parse_args(argv)
    return run_command(lambda: arguments.run(arguments))


def _load(module: str) -> ModuleType:
    """Imports a command's module. Where a package of an extra is missing, the process ends with one line."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        reason = missing_package(error)
        if reason is None:
            raise

    def fail() -> None:
        raise BackendMissingError(reason)

    sys.exit(run_command(fail))


if __name__ == "__main__":
    sys.exit(main())
