"""The directory of a run: its lock, and the recognition of a directory that was mistyped or replaced."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from sdpnet.pipelines.files.atomic_write import exclusive, partial_path

__all__ = ["LOCK_NAME", "RunDirectory", "no_run_in", "run_directory"]

LOCK_NAME: Final = ".lock"
_WRITTEN: Final = ("config.yaml", "metrics.jsonl", "per_class.csv", "model.safetensors", "model.json", ".torchrun")


class RunDirectory:
    """The directory of a run, held by this process.

    The directory and its lock stay open while they are held. A name can come to mean another directory, and the file
    system may give the inode number of a removed file to a new one, but not while the old one is open. Comparing the
    open directory with the one at `path` therefore finds every replacement.

    Attributes:
        path: the path as the user gave it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock: os.stat_result | None = None

    def require_own(self) -> None:
        """Raises `OSError` if `path` is not the directory that this process holds any more.

        This is so if the directory was removed, renamed or replaced, or if another run has started in it. Files that
        are written to `path` from then on would go into another run.
        """
        try:
            present = os.stat(self.path)
        except FileNotFoundError:
            raise OSError(errno.ENOENT, "the run's folder was removed or renamed", str(self.path)) from None
        if not os.path.samestat(present, os.fstat(self._descriptor)):
            raise OSError(errno.ESTALE, "the run's folder was replaced by another one", str(self.path))
        lock = self._present_lock()
        if lock is not None and self._lock is not None and not os.path.samestat(lock, self._lock):
            raise OSError(errno.ESTALE, "another run has begun in the run's folder", str(self.path))

    def remember_lock(self) -> None:
        """Records the identity of the lock file; to be called once this process holds the lock."""
        self._lock = self._present_lock()
        self.require_own()

    def remove_lock(self) -> None:
        """Removes the lock of this process, even if its directory was renamed. The lock of another process stays."""
        lock = self._present_lock()
        if lock is not None and self._lock is not None and os.path.samestat(lock, self._lock):
            os.unlink(LOCK_NAME, dir_fd=self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _present_lock(self) -> os.stat_result | None:
        with suppress(FileNotFoundError):
            return os.stat(LOCK_NAME, dir_fd=self._descriptor, follow_symlinks=False)
        return None


@contextmanager
def run_directory(out: Path) -> Iterator[RunDirectory]:
    """Creates the directory of a run and holds its lock; for the main process.

    Temporary files that a killed run left in it are removed. The lock ends with the process, even if the process is
    killed, so that the next run can start at once. On exit, directories that were created here and are still empty are
    removed. If the directory was renamed or replaced meanwhile, the one in its place is not touched.

    Raises:
        UserError: another run holds the directory. The message names its process.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    made: list[tuple[Path, os.stat_result]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        made = [(folder, folder.stat()) for folder in missing]
        directory = RunDirectory(out)
        try:
            with exclusive(out / LOCK_NAME):
                directory.remember_lock()
                try:
                    for name in _WRITTEN:
                        partial_path(out / name).unlink(missing_ok=True)
                    yield directory
                finally:
                    directory.remove_lock()
        finally:
            directory.close()
    finally:
        for folder, status in made:
            with suppress(OSError):  # it is not empty, another run starts in it, or it does not exist any more
                if os.path.samestat(folder.stat(), status):
                    folder.rmdir()


def no_run_in(out: Path) -> str:
    """The message for a user who wants to resume a run where there is none; it names the run that may be meant."""
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
    depth = len(missing.parts)  # the number of missing folders; more than two are no typing error
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
    """The runs that are `depth` levels of folders below `base`, as far as the folders can be read."""
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
