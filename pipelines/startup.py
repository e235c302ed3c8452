"""Handles Ctrl-C while a command starts.

Importing torch takes seconds, and an interrupt during the import would end in a traceback. Each package of this project
therefore calls `end_on_interrupt` first. In a process that was started as one of this project's commands, Ctrl-C then
ends the process with one line, until `sdpnet.pipelines.errors.run_command` takes over. Other programs that import the
packages are not affected. This module imports very little itself.
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
    *(f"preprocess.{name}" for name in ("adopt", "build_dali", "build_ffcv", "convert")),
    *(f"preprocess.{name}" for name in ("describe", "make_synthetic", "verify")),
    *("pipelines.bench", "pipelines.benchmarks.augment"),
    *("benchmarks.depthwise", "benchmarks.step", "cli", "train"),
)
_SCRIPTS: Final = ("sdpnet", "train")  # the programs beside Python; train is there only for a checkout
_WITH_VALUE: Final = ("-W", "-X", "--check-hash-based-pycs")


def end_on_interrupt() -> None:
    """From now on, Ctrl-C prints one line and ends the process with status 130, if it was started as a command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and is_command(sys.orig_argv):
        _replace(_end)


def raise_on_interrupt() -> None:
    """Makes Ctrl-C raise `KeyboardInterrupt` again, after `end_on_interrupt`."""
    if signal.getsignal(signal.SIGINT) is _end:
        _replace(signal.default_int_handler)


def is_command(words: list[str]) -> bool:
    """Whether the words of a command line (`sys.orig_argv`) start one of this project's commands.

    It is False for Python's own helper processes, such as those of multiprocessing.
    """
    rest = iter(words[1:])
    for word in rest:
        if word in _WITH_VALUE:
            next(rest, None)
        elif word.startswith("-") and len(word) > 1:
            if not word.startswith("--") and word[-1] in "mc":  # -m, also after other flags, as in -um
                return word[-1] == "m" and next(rest, "") in {"sdpnet", *(f"sdpnet.{module}" for module in _MODULES)}
        else:
            return _is_script(word)
    return False


def _is_script(path: str) -> bool:
    """Whether a file is an installed program of this project, or one of its modules run as a file."""
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
    """Ends the process without an exception: libraries replace an exception that arrives while they are imported."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)
