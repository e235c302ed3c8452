"""A run's directory: it belongs to one process at a time, and a mistyped one is recognised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from pipelines.publish import exclusive, partial_path

__all__ = ["LOCK_NAME", "no_run_in", "run_directory"]

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


def no_run_in(out: Path) -> str:
    """The line for a person who wants to resume a run where there is none: it names the run that may be meant."""
    if (out / "checkpoints").is_dir():
        return f"{out}: has checkpoints, but no config.yaml; pass --config NAME as the run had it"
    for folder in out.parents if ".." not in out.parts else ():
        if _is_run(folder):
            return f"{out}: is not a run, but lies in one; pass --out {folder}"
    parents = [folder for folder in (out, *out.parents) if folder.is_dir()]
    existing = parents[0] if parents else Path()
    if existing == out and (inside := _runs(out, 1)):
        return f"{out}: is not a run, but holds {_listed(inside)}; pass the folder of one as --out"
    base = out.parent if existing == out else existing
    missing = out.relative_to(base)
    depth = len(missing.parts)  # of the folders that are not there; more than two are no slip of the fingers
    beside = _runs(base, depth) if depth <= 2 else []
    names = {str(run.relative_to(base)): run for run in beside}
    if near := get_close_matches(str(missing), names, n=1, cutoff=0.5):
        return f"{out}: no run is there to resume; did you mean --out {names[near[0]]}?"
    others = f"the runs beside it are {_listed(beside)}" if beside else "nor is there one beside it"
    return f"{out}: no run is there to resume; {others}; to begin one, pass --config NAME and --data SHARDS"


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (
        (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists()
    )


def _runs(base: Path, depth: int) -> list[Path]:
    """The runs so many folders below `base`, as far as they can be read."""
    found = [base]
    for _ in range(depth):
        below: list[Path] = []
        for folder in found:
            with suppress(OSError):
                below += [path for path in folder.iterdir() if path.is_dir()]
        found = sorted(below)[:1000]
    return [path for path in found if _is_run(path)]


def _listed(runs: list[Path]) -> str:
    names = ", ".join(map(str, runs[:5]))
    return f"{names} and {len(runs) - 5} others" if len(runs) > 5 else names
