"""Cores that are there, limited by a container or busy, as Linux states it; and what is installed."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sdpnet.pipelines import machine
from sdpnet.pipelines.machine import busy_cores, cgroup_cores, core_share, installed_versions, usable_cores
from sdpnet.pipelines.options import DataOptions


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"pod/cpu.max": "400000 100000\n", "pod/job/cpu.max": "max 100000\n"}, "0::/pod/job\n", 4.0),
        ({"pod/cpu.max": "50000 100000\n", "pod/job/cpu.max": "200000 100000\n"}, "0::/pod/job\n", 0.5),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3:cpuset:/\n2:cpu:/\n", 3.0),
        ({"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, "1:cpu,cpuacct:/a\n", None),
        ({"cpu.max": "nonsense\n"}, "0::/\n", None),
        ({}, "0::/gone\n", None),
    ],
)
def test_the_cgroups_limit(files: dict[str, str], own: str, expected: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        write(tmp_path / "sys" / name, text)
    write(tmp_path / "own", own)
    assert cgroup_cores(tmp_path / "sys", tmp_path / "own") == expected


def test_without_cgroups(tmp_path: Path) -> None:
    assert cgroup_cores(tmp_path, tmp_path / "absent") is None


def test_versions() -> None:
    import numpy

    versions = installed_versions()
    assert versions["python"] == platform.python_version() and versions["numpy"] == numpy.__version__
    assert len(usable_cores()) >= 1


@pytest.mark.parametrize(
    ("cores", "limit", "processes", "share"),
    [
        (8, None, 1, 8),
        (8, None, 3, 2),
        (8, 2.0, 1, 2),
        (8, 1.5, 1, 1),
        (8, 0.5, 1, 1),
        (8, 6.0, 2, 3),
        (2, 16.0, 1, 2),
        (2, None, 8, 1),
    ],
)
def test_the_share_of_a_process(
    cores: int, limit: float | None, processes: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: list(range(cores)))
    monkeypatch.setattr(machine, "cgroup_cores", lambda: limit)
    assert core_share(processes) == share
    assert DataOptions().threads(processes) == share


STAT = """cpu  {} 0 0 {} 0 0 0 0 0 0
cpu0 {} 5 10 {} 7 0 0 0 0 0
cpu1 {} 5 10 {} 7 0 0 3 0 0
cpu2 {} 5 10 {} 7 0 0 3 0 0
intr 12345 0 0
"""


@pytest.mark.parametrize(
    ("worked", "expected"), [((0, 0, 100), 0.0), ((100, 0, 0), 1.0), ((100, 100, 0), 2.0), ((50, 25, 99), 0.75)]
)
def test_busy_cores_are_counted_among_ours(
    worked: tuple[int, int, int], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three cores this process may use two; each has 100 ticks between the looks."""
    monkeypatch.setattr(machine, "usable_cores", lambda: [0, 1])
    stat = tmp_path / "stat"
    stat.write_text(STAT.format(0, 0, 1000, 2000, 1000, 2000, 1000, 2000))

    def sleep(seconds: float) -> None:
        ticks = [number for work in worked for number in (1000 + work, 2100 - work)]
        stat.write_text(STAT.format(0, 0, *ticks))

    assert busy_cores(stat=stat, sleep=sleep) == pytest.approx(expected)


@pytest.mark.parametrize("text", [None, "", "cpu0 0 0 0 0 0 0 0\n", "cpu0 nonsense\n"])
def test_the_load_average_where_linux_does_not_say(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: [0, 1])
    monkeypatch.setattr("os.getloadavg", lambda: (1.25, 9.0, 9.0))
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert busy_cores(stat=tmp_path / "stat", sleep=lambda _: None) == 1.25
    monkeypatch.setattr("os.getloadavg", lambda: (50.0, 0.0, 0.0))
    assert busy_cores(stat=tmp_path / "stat", sleep=lambda _: None) == 2


def test_a_busy_loop_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine: another process that keeps one of our cores busy, pinned to it."""
    core = usable_cores()[0]
    script = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as loop:
        try:
            assert loop.stdout is not None and loop.stdout.readline() == b"\n"
            monkeypatch.setattr(machine, "usable_cores", lambda: [core])
            assert busy_cores() == pytest.approx(1, abs=0.1)
        finally:
            loop.kill()
