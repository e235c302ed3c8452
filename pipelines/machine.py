"""What this machine and this installation are: cores, cards, versions, commit. Says None where it cannot be known."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

__all__ = [
    "DISTRIBUTIONS",
    "busy_cores",
    "cgroup_cores",
    "commit",
    "core_share",
    "cpu_name",
    "driver",
    "installed_versions",
    "usable_cores",
]

# name -> the distributions that may hold it
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
    """How many cores' time each of `processes` here can have, at least 1: the usable cores or the container's limit,
    whichever is less, in whole cores. Threads beyond it are stopped by the system while the others wait for them."""
    cores, limit = float(len(usable_cores())), cgroup_cores()
    return max(1, int((cores if limit is None else min(cores, limit)) // processes))


def busy_cores(
    seconds: float = 0.3, stat: Path = Path("/proc/stat"), sleep: Callable[[float], None] = time.sleep
) -> float:
    """How many of the usable cores other processes keep busy: looked at for `seconds`, in which this one sleeps.

    The load average of the last minute, which still counts work that has ended, serves only where Linux does not say.
    """
    cores = usable_cores()
    before = _busy_ticks(stat, cores)
    sleep(seconds)
    after = _busy_ticks(stat, cores)
    if before is None or after is None or sum(after) <= sum(before):
        return min(float(len(cores)), os.getloadavg()[0])
    return len(cores) * (after[0] - before[0]) / (sum(after) - sum(before))


def _busy_ticks(stat: Path, cores: list[int]) -> tuple[int, int] | None:
    """The ticks that the cores have worked and idled, or None where that cannot be read."""
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
    """How many cores' time a container's limit leaves: the least of cgroup v2's `cpu.max` upwards, or v1's quota."""
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
    except (OSError, ValueError):  # not there, or "max 100000"
        return None
    return quota / period if quota > 0 and period > 0 else None


def cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def driver() -> str | None:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n", 1)[0].strip() or None


def installed_versions() -> dict[str, str | None]:
    """Python's version and those of `DISTRIBUTIONS`; None is not installed."""
    return {"python": platform.python_version(), **{name: _version(names) for name, names in DISTRIBUTIONS.items()}}


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def commit() -> str | None:
    """The commit of this checkout, with "+" where files differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        named = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return named.stdout.strip() + ("+" if changed.stdout.strip() else "")
