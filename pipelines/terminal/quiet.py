"""The flag `--quiet`: with it, a command prints neither its progress nor the command to type next."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["add_quiet", "is_quiet", "quietly"]

_quiet = False  # one command runs in a process


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds `--quiet` to a command's flags."""
    help = "print results and errors only: no progress, and no command to type next"
    parser.add_argument("--quiet", action="store_true", help=help)


def is_quiet() -> bool:
    """Whether the running command was started with `--quiet`."""
    return _quiet


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """A context in which `is_quiet` returns `quiet`."""
    global _quiet
    before, _quiet = _quiet, quiet
    try:
        yield
    finally:
        _quiet = before
