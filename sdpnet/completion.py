"""The script with which a shell completes commands, flags, choices, config names and config keys: `sdpnet completion`.

shtab writes the script from the parsers of all commands. torch is not imported, and the script starts no Python.
"""

from __future__ import annotations

import argparse
import importlib

from sdpnet.cli import COMMANDS, top_parser
from sdpnet.config.key_reference import sections
from sdpnet.config.names import config_names
from sdpnet.flags.completion import SHELLS, add_arguments
from sdpnet.pipelines.errors import BackendMissingError
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
        importlib.import_module(command.flags).add_arguments(commands[name])
        for action in commands[name]._actions:
            _complete_values(action, name, shtab.FILE)
    script: str = shtab.complete(parser, shell)
    return script


def _complete_values(action: argparse.Action, command: str, files: object) -> None:
    """Says what the values of a flag are completed with: the parser is only read, it parses nothing."""
    if action.dest == "config":
        action.choices = config_names()
    elif command == "config" and action.dest == "section":
        known = sections()
        action.choices = [section.name for section in known if section.name]
        action.choices += [key.name for section in known for key in section.keys]
    elif command == "completion":
        action.choices = SHELLS
    elif not action.choices and action.nargs != 0 and action.type not in (int, float):
        action.complete = files  # type: ignore[attr-defined]


def run(arguments: argparse.Namespace) -> int:
    """Prints the script. Returns the exit status, 0."""
    say(*completion_script(arguments.shell).splitlines())
    return 0
