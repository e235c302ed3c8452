"""Describes this machine and this installation: cores, driver, versions, commit. Unknown values are None."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = [
    "DISTRIBUTIONS",
    "MAX_WORKERS",
    "busy_cores",
    "cgroup_cores",
    "commit",
    "core_share",
    "cpu_name",
    "driver",
    "installed_versions",
    "usable_cores",
]

MAX_WORKERS: Final = 512  # of `--workers`: all of them start at once, and a process takes at least 13 MB
# name -> the distributions that may provide it
DISTRIBUTIONS: Final = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "numpy": ("numpy",),
    "pillow": ("pillow",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "ffcv": ("ffcv",),
    "webdataset": ("webdataset",),
    "timm": ("timm",),
}


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def core_share(processes: int = 1) -> int:
    """The number of whole cores that each of `processes` processes on this machine can use, at least 1.

    It is derived from the usable cores and the container's limit, whichever is less. With more threads than that, the
    system stops some while the others wait for them.
    """
    cores, limit = float(len(usable_cores())), cgroup_cores()
    return max(1, int((cores if limit is None else min(cores, limit)) // processes))


def busy_cores(
    seconds: float = 0.3, stat: Path = Path("/proc/stat"), sleep: Callable[[float], None] = time.sleep
) -> float:
    """The number of usable cores that other processes keep busy, measured for `seconds` while this process sleeps.

    Where Linux does not tell, the load average is used instead; it still counts work that ended within the last minute.
    """
    cores = usable_cores()
    before = _busy_ticks(stat, cores)
    sleep(seconds)
    after = _busy_ticks(stat, cores)
    if before is None or after is None or sum(after) <= sum(before):
        return min(float(len(cores)), os.getloadavg()[0])
    return len(cores) * (after[0] - before[0]) / (sum(after) - sum(before))


def _busy_ticks(stat: Path, cores: list[int]) -> tuple[int, int] | None:
    """The clock ticks for which the cores were busy and idle, or None if they cannot be read."""
    wanted, busy, idle = {f"cpu{core}" for core in cores}, 0, 0
    try:
        for name, *words in map(str.split, stat.read_text().splitlines()):
            if name in wanted:
                ticks = [int(word) for word in words[:8]]  # user nice system idle iowait irq softirq steal
                idle += ticks[3] + ticks[4]
                busy += sum(ticks) - ticks[3] - ticks[4]
    except (OSError, ValueError, IndexError):
        return None
    return (busy, idle) if busy + idle else None


def cgroup_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The number of cores that a container's limit allows, or None without a limit.

    It is the lowest `cpu.max` of this process's cgroup (v2) and its parents, or the lowest quota of cgroup v1.
    """
    limits = []
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            below = root / path.lstrip("/")
            for directory in (below, *below.parents):
                limits.append(_quota(directory / "cpu.max"))
                if directory == root:
                    break
        elif "cpu" in controllers.split(","):
            for directory in (root / "cpu" / path.lstrip("/"), root / "cpu"):
                limits.append(_quota(directory / "cpu.cfs_quota_us", directory / "cpu.cfs_period_us"))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(*files: Path) -> float | None:
    try:
        quota, period = (int(word) for file in files for word in file.read_text().split())
    except (OSError, ValueError):  # no such file, or "max 100000"
        return None
    return quota / period if quota > 0 and period > 0 else None


def cpu_name() -> str | None:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def driver() -> str | None:
    """The version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n", 1)[0].strip() or None


def installed_versions() -> dict[str, str | None]:
    """The versions of Python and of `DISTRIBUTIONS`; None for packages that are not installed."""
    return {"python": platform.python_version(), **{name: _version(names) for name, names in DISTRIBUTIONS.items()}}


def _version(distributions: tuple[str, ...]) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def commit() -> str | None:
    """The commit of this checkout, followed by "+" if files differ from it.

    It is None for an installed copy, which may lie in an environment inside another project's checkout. A copy that
    scripts/gpu_bundle.py has made is without git; it has the commit in a file `COMMIT`.
    """
    written = Path(__file__).resolve().parents[1] / "COMMIT"
    if written.is_file():
        return written.read_text(encoding="utf-8").strip()
    if not written.with_name("pyproject.toml").is_file():
        return None
    git = ["git", "-C", str(written.parent)]
    try:
        named = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return named.stdout.strip() + ("+" if changed.stdout.strip() else "")
