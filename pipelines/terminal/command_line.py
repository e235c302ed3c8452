"""The parser of all commands. Each command has `add_arguments(parser)` and `run(arguments) -> int`.

The parser is argparse's; it also suggests the most similar flag or word for one that it does not know.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from math import inf
from typing import Any, NoReturn

from sdpnet.pipelines.errors import printable, run_command
from sdpnet.pipelines.terminal.quiet import quietly

__all__ = ["CommandParser", "LooseWords", "parse", "run_alone", "run_parsed"]


def run_alone(
    program: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs one command from its command line. Returns the exit status.

    Args:
        program: the program's name in usage and error messages.
        description: the description of the command for --help.
        add_arguments: adds the flags to a parser, and an epilog if there is one.
        run: runs the command with the result of `parse`.
        argv: the words after the program's name; by default those of this process.

    Raises:
        SystemExit: with status 2, for unknown flags.
    """
    return run_parsed(parse(program, description, add_arguments, argv), run)


def parse(
    program: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """The flags of a command line. The namespace also has `argv`, the words. The arguments are those of `run_alone`."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = CommandParser(prog=program, description=description)
    add_arguments(parser)
    arguments = parser.parse_args(words)
    arguments.argv = words
    return arguments


def run_parsed(arguments: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Runs a command with the result of `parse`. Returns the exit status."""
    with quietly(getattr(arguments, "quiet", False)):
        return run_command(lambda: run(arguments))


class LooseWords(argparse._AppendAction):
    """The action of a flag whose name may be omitted before its values.

    `CommandParser` inserts the flag before each word that no other flag takes and that matches `pattern`. Such words
    may therefore stand anywhere on the command line. argparse's own positional arguments with `nargs="*"` end at the
    first flag after them.

    Attributes:
        pattern: what the values look like; by default like nothing.
        as_flag: what a value looks like that is written as a flag of its own, `--KEY=VALUE` or `--KEY VALUE`. Group 1
            is the key, group 2 the rest from "=" on, or None.
    """

    pattern: re.Pattern[str] = re.compile(r"(?!)")
    as_flag: re.Pattern[str] = re.compile(r"(?!)")

    def advice(self, flag: str) -> str:
        """How to write an unknown flag of the command line as one of these values; "" if it is none of them."""
        return ""


class CommandParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without abbreviations and with remedies in its messages.

    Control characters in messages are escaped. As in argparse, a mistake ends the program with the usage and one line
    on stderr, and status 2.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self._words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = sys.argv[1:] if args is None else list(args)
        self._refuse_empty()
        return super().parse_known_args(self._with_flags(self._words), namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments") and (command := self._command()) is not None:
            command.error(message)  # the unknown words were meant for the command
        super().error(printable(f"{message}{self._hint(message)}"))

    def _refuse_empty(self) -> None:
        """Refuses empty words. An empty path is the current directory, which `--out "$OUT"` without OUT would fill."""
        if any(isinstance(action, argparse._SubParsersAction) for action in self._actions):
            return  # the command's own parser checks
        for before, word in zip(["", *self._words], self._words, strict=False):
            if word == "" or re.fullmatch("--[a-z-]+=", word):
                flag = word.rstrip("=") or (before if before in self._option_string_actions else "")
                self.error(f"{f'argument {flag}: ' if flag else ''}an empty value, as of a variable that is not set")

    def _with_flags(self, words: Sequence[str]) -> list[str]:
        """The words, with the omitted flags of `LooseWords` inserted."""
        loose = self._loose()
        if not loose:
            return list(words)
        found: list[str] = []
        values = 0.0  # the number of following words that belong to the last flag
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word == "--":
                return [*found, word, *rest]
            if word.startswith("-"):
                flag = self._option_string_actions.get(word)
                values = 0 if flag is None else _values_taken(flag)
                if flag is None and (value := self._written_as_flag(word, rest, loose)):
                    found += value
                    continue
            elif values:
                values -= 1
            else:
                found += [action.option_strings[0] for action in loose if action.pattern.fullmatch(word)][:1]
            found.append(word)
        return found

    def _written_as_flag(self, word: str, rest: list[str], loose: list[LooseWords]) -> list[str]:
        """The words for a value of `LooseWords` that is written as a flag; the value is removed from `rest`."""
        for action in loose:
            if (match := action.as_flag.fullmatch(word)) is None:
                continue
            key, given = match[1].replace("-", "_"), match[2]
            if given is None:
                if not rest or re.match(r"-(?![\d.])", rest[0]):
                    self.error(f"{word}: no value; write {key}=VALUE")
                given = f"={rest.pop(0)}"
            return [action.option_strings[0], f"{key}{given}"]
        return []

    def _loose(self) -> list[LooseWords]:
        return [action for action in self._actions if isinstance(action, LooseWords)]

    def _instead_of(self, flag: str) -> str:
        """What to write instead of an unknown flag."""
        flags = list(self._option_string_actions)
        near = get_close_matches(flag, flags, n=1, cutoff=0.7)
        if not get_close_matches(flag, flags, n=1, cutoff=0.9):
            advice = next(filter(None, (action.advice(flag) for action in self._loose())), "")
            if advice:
                return advice
        return f"did you mean {near[0]}?" if near else "--help lists the flags"

    def _command(self) -> CommandParser | None:
        """The parser of the command on the command line, or None if this parser has no commands."""
        known = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return next((choices[word] for choices in known for word in self._words if word in choices), None)

    def _hint(self, message: str) -> str:
        """A remedy to append to one of argparse's messages, or ""."""
        if unknown := re.search(r"invalid choice: '([^']*)'", message):
            if (flag := f"--{unknown[1]}") in self._option_string_actions:
                return f"; did you mean {flag}?"
            choices = [str(choice) for action in self._actions for choice in action.choices or ()]
            near = get_close_matches(unknown[1], choices, n=1, cutoff=0.5)
            return f"; did you mean {near[0]!r}?" if near else ""
        words = self._words[: self._words.index("--")] if "--" in self._words else self._words
        for word in words:
            flag = word.split("=", 1)[0]
            known = flag in self._option_string_actions or any(a.as_flag.fullmatch(word) for a in self._loose())
            if flag.startswith("--") and not known:
                return f" ({flag}: {self._instead_of(flag)})"
        loose = bool(words) and not words[0].startswith("-")
        loose = loose or re.match(r"unrecognized arguments: [^-]", message) is not None
        if loose and all(action.option_strings for action in self._actions):
            with_values = [flag for flag, action in self._option_string_actions.items() if action.nargs != 0]
            return f" (each value needs its flag: {', '.join(with_values)})"
        return ""


def _values_taken(flag: argparse.Action) -> float:
    """The largest number of words after a flag that are its values."""
    if isinstance(flag.nargs, int):
        return flag.nargs
    return 1 if flag.nargs in (None, argparse.OPTIONAL) else inf
