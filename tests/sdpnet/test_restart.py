from __future__ import annotations

from pathlib import Path

import pytest

from sdpnet.distributed.restart import LAUNCH_NAME, is_restart_of_own_run, record_launch


def launch(monkeypatch: pytest.MonkeyPatch, job: str, restarts: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))


def test_only_a_restart_of_the_same_launch_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, "job 7", 0)
    assert not is_restart_of_own_run(tmp_path)
    record_launch(tmp_path)
    assert not is_restart_of_own_run(tmp_path), "a first start says --resume"
    launch(monkeypatch, "job 7", 1)
    assert is_restart_of_own_run(tmp_path)
    launch(monkeypatch, "job 8", 1)
    assert not is_restart_of_own_run(tmp_path), "its first start was refused"


def test_a_launch_without_a_name_is_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, "none", 0)
    record_launch(tmp_path)
    launch(monkeypatch, "none", 2)
    assert is_restart_of_own_run(tmp_path)
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert not is_restart_of_own_run(tmp_path)


def test_without_torchrun_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, "job 7", 1)
    record_launch(tmp_path)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name)
    assert not is_restart_of_own_run(tmp_path)
    record_launch(tmp_path)
    assert not (tmp_path / LAUNCH_NAME).exists()
