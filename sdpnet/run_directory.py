"""A run's directory belongs to one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from pipelines.publish import exclusive, partial_path

__all__ = ["LOCK_NAME", "run_directory"]

LOCK_NAME: Final = ".lock"


@contextmanager
def run_directory(out: Path) -> Iterator[Path]:
    """Makes the directory of a run and holds its lock, in the main process; what a killed run left there is removed.

    The lock ends with the process, however that ends, so that the next one may begin at once. A directory that was made
    here and is still empty goes again. Raises `UserError`, naming the process, when another run holds it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = out / LOCK_NAME
        with exclusive(lock):
            for name in ("config.yaml", "model.safetensors", "model.json"):
                partial_path(out / name).unlink(missing_ok=True)
            try:
                yield out
            finally:
                lock.unlink(missing_ok=True)
    finally:
        for folder in made:
            with suppress(OSError):  # not empty, or another run begins in it
                folder.rmdir()
