"""Runs this project's own commands as processes, from a checkout or a bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sdpnet.pipelines.errors import UserError

__all__ = ["ROOT", "environment", "run_module"]

ROOT: Final = Path(__file__).resolve().parents[3]  # the checkout, which has the tests


def environment() -> dict[str, str]:
    """The variables for the commands: this package can be imported, and tables are wide."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "160",
    }


def run_module(module: str, words: Sequence[str | Path], **options: Any) -> str:
    """Runs `python -m MODULE WORDS...` and returns its stdout if `options` capture it.

    Args:
        options: further arguments of `subprocess.run`.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, env=environment(), text=True, check=False, **options)
    if done.returncode:
        raise UserError(f"{module} ended with status {done.returncode}; its output is above")
    return done.stdout or ""
