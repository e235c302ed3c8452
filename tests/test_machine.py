"""A container's limit on cores as Linux states it (cgroups v1 and v2), and what is installed."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from pipelines.machine import cgroup_cores, installed_versions, usable_cores


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
