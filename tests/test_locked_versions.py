"""requirements.lock: one file for several Pythons, compared with what is installed."""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

import pytest
from locked_versions import explain, installed_versions, locked_versions, write

ROOT = Path(__file__).resolve().parent.parent
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
LOCK = f"""# a comment
torch==2.14.1 ; python_full_version >= '{HERE}'
torch==2.9.0 ; python_full_version < '{HERE}'
Typing_Extensions==4.16.0    # via torch
nothing==1.0 ; sys_platform == 'plan9'
"""


def test_the_lines_for_this_python() -> None:
    assert locked_versions(LOCK) == {"torch": "2.14.1", "typing-extensions": "4.16.0"}


def test_local_parts_do_not_count() -> None:
    import torch

    assert installed_versions()["torch"] == torch.__version__.split("+")[0]


def test_what_a_failure_means(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    assert explain(lock, {})[-1].endswith("there is no requirements.lock to compare these versions with")
    lock.write_text(LOCK)
    same = explain(lock, {"torch": "2.14.1", "typing-extensions": "4.16.0"})
    assert "these are the versions that the suite last passed with" in same[1] and "report it" in same[2]
    other = explain(lock, {"torch": "2.15.0", "typing-extensions": "4.16.0"})
    assert "with other versions (requirements.lock): torch 2.14.1" in other[1] and "./dev setup --locked" in other[2]
    assert "torch 2.15.0" in other[0]
    assert "last passed with" in explain(lock, {"torch": "2.14.1"})[1], "what is left out (FFCV, DALI) is no difference"


def test_the_lock_is_what_passed(tmp_path: Path) -> None:
    lock, day = tmp_path / "requirements.lock", datetime.date(2026, 1, 2)
    with pytest.raises(SystemExit, match=r"other versions than passed: torch 2.14.1 \(2.15.0 passed\)"):
        write(LOCK, lock, {"torch": "2.15.0"}, day)
    assert not lock.exists()
    write(LOCK, lock, {"torch": "2.14.1"}, day)
    assert "2026-01-02: Python 3" in lock.read_text() and locked_versions(lock.read_text())["torch"] == "2.14.1"


@pytest.mark.skipif(not (ROOT / "requirements.lock").exists(), reason="not written yet")
def test_ours_pins_all_that_the_project_asks_for() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text, "no address of an index"
    pins = locked_versions(text)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = project.partition("\nwheel = [")[0]  # the tools of ./dev wheel are installed apart
    wanted = {name.lower() for name in re.findall(r'^    "([A-Za-z][\w-]*)[<>=]', project, re.MULTILINE)}
    assert {"torch", "pillow", "ray", "ffcv", "onnx", "ruff"} <= wanted <= set(pins)
    for python in ("3.10", "3.12", "3.14"):
        marker = {"python_version": python, "python_full_version": f"{python}.1"}
        pinned = locked_versions(text, marker)
        assert set(wanted) <= set(pinned) and pinned["pillow"].startswith("12." if python == "3.10" else "13.")
