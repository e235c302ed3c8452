"""Ctrl-C while a command starts: importing torch takes seconds, and an interrupt within it would end in a traceback.

Each package of this project calls `end_on_interrupt` first of all. In a process that was started as one of its commands
Ctrl-C then ends the process with one line, until `sdpnet.pipelines.errors.run_command` takes over; in every other
program that imports the packages nothing changes. Imports next to nothing itself.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Final

__all__ = ["end_on_interrupt", "is_command", "raise_on_interrupt"]

_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of `sdpnet`
_MODULES: Final = (  # inside `sdpnet`
    *(f"preprocess.{name}" for name in ("adopt", "build_dali", "build_ffcv", "describe", "make_synthetic", "verify")),
    *("pipelines.bench", "pipelines.benchmarks.augment"),
    *("benchmarks.depthwise", "benchmarks.step", "cli", "train"),
)
_SCRIPTS: Final = ("sdpnet", "train")  # that an installation puts beside Python
_WITH_VALUE: Final = ("-W", "-X", "--check-hash-based-pycs")


def end_on_interrupt() -> None:
    """In a process that was started as a command, Ctrl-C prints one line and ends it with status 130 from now on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and is_command(sys.orig_argv):
        _replace(_end)


def raise_on_interrupt() -> None:
    """Undoes `end_on_interrupt`: Ctrl-C raises `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _end:
        _replace(signal.default_int_handler)


def is_command(words: list[str]) -> bool:
    """Whether the words of a command line (`sys.orig_argv`) start one of this project's commands.

    Python's own helper processes, as multiprocessing starts them, do not.
    """
    rest = iter(words[1:])
    for word in rest:
        if word in _WITH_VALUE:
            next(rest, None)
        elif word.startswith("-") and len(word) > 1:
            if not word.startswith("--") and word[-1] in "mc":  # -m, or behind other flags: -um
                return word[-1] == "m" and next(rest, "") in {f"sdpnet.{module}" for module in _MODULES}
        else:
            return _is_script(word)
    return False


def _is_script(path: str) -> bool:
    folder, name = os.path.split(os.path.realpath(path))
    if name in _SCRIPTS:
        beside = {os.path.realpath(os.path.dirname(sys.executable)), os.path.expanduser("~/.local/bin")}
        return folder in beside
    files = (os.path.join(_PACKAGE, *module.split(".")) + ".py" for module in _MODULES)
    return os.path.join(folder, name) in {os.path.realpath(file) for file in files}


def _replace(handler: object) -> None:
    with suppress(ValueError):  # not in the main thread, or not in the main interpreter
        signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]


def _end(number: int, frame: object) -> None:
    """Not by an exception: libraries turn one that comes while they are imported into others."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)
