"""Programs that run kernels in Triton's interpreter or compile them, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

__all__ = ["needs_interpreter", "needs_triton", "run"]

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is not None and version("triton") < "3.7" and np.__version__ >= "2.4",
    reason="Triton's interpreter before 3.7 cannot do with NumPy 2.4",
)


def run(*command: str, **environment: str) -> str:
    """The output of Python with these arguments, which must end with status 0."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
