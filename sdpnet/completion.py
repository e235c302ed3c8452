"""The script with which a shell completes commands, flags, choices, config names and config keys: `sdpnet completion`.

shtab writes the script from the parsers of all commands. torch is not imported, and the script starts no Python.
"""

from __future__ import annotations

import argparse
import importlib
import re

from sdpnet.cli import COMMANDS, STEP, Command, top_parser
from sdpnet.config.key_reference import sections
from sdpnet.config.names import config_names
from sdpnet.flags.completion import SHELLS, add_arguments
from sdpnet.pipelines.errors import BackendMissingError
from sdpnet.pipelines.terminal.command_line import LooseWords
from sdpnet.pipelines.terminal.remedy import install_extra
from sdpnet.reporting.output import say

__all__ = ["add_arguments", "completion_script", "run"]


def completion_script(shell: str) -> str:
    """The script for one of the shells in `SHELLS`. Raises `BackendMissingError` if shtab is not installed."""
    try:
        shtab = importlib.import_module("shtab")
    except ModuleNotFoundError:
        raise BackendMissingError(f"completion needs shtab: {install_extra('completion')}") from None
    parser, commands = top_parser()
    for name, command in COMMANDS.items():
        _add_flags(commands[name], name, command, shtab.FILE)
    step = commands["bench"].add_subparsers().add_parser("step", help=STEP.purpose)
    _add_flags(step, "bench step", STEP, shtab.FILE)
    script: str = shtab.complete(parser, shell)
    return _mended_for_zsh(script) if shell == "zsh" else script


def _add_flags(parser: argparse.ArgumentParser, name: str, command: Command, files: object) -> None:
    importlib.import_module(command.flags).add_arguments(parser)
    for action in parser._actions:
        _complete_values(action, name, files)
    if any(isinstance(action, LooseWords) for action in parser._actions):
        parser.add_argument("setting", nargs="*")  # without it, zsh completes no flag after a word such as optim.lr=1


def _complete_values(action: argparse.Action, command: str, files: object) -> None:
    """Says what the values of a flag are completed with: the parser is only read, it parses nothing."""
    if action.dest in ("config", "diff"):
        action.choices = config_names()
    elif command == "config" and action.dest == "section":
        known = sections()
        action.choices = [section.name for section in known if section.name]
        action.choices += [key.name for section in known for key in section.keys]
    elif command == "completion":
        action.choices = SHELLS
    elif isinstance(action, LooseWords):
        pass
    elif not action.choices and action.nargs != 0 and action.type not in (int, float):
        action.complete = files  # type: ignore[attr-defined]


def _mended_for_zsh(script: str) -> str:
    """shtab 1.13 lets zsh complete the first of several words only, of an argument and of the values of a flag."""
    script = re.sub(r'"\(\*\)::?', '"*:', script)
    return re.sub(r":\('(\w+)', '(\w+)'\):(\([^)]*\))", r":\1:\3:\2:\3", script)


def run(arguments: argparse.Namespace) -> int:
    """Prints the script. Returns the exit status, 0."""
    say(*completion_script(arguments.shell).splitlines())
    return 0
