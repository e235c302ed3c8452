from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sdpnet.config.options import LogOptions
from sdpnet.pipelines.errors import UserError
from sdpnet.reporting.trackers import open_trackers


def test_nothing_is_asked_for(tmp_path: Path) -> None:
    assert open_trackers(LogOptions(), tmp_path, resumed_step=0, config={}) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    """Killed after step 5, resumed from the checkpoint of step 3: steps 4 and 5 are the second process's."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resumed, steps in ((0, range(1, 6)), (3, range(4, 9))):
        (tracker,) = open_trackers(LogOptions(tensorboard=True), tmp_path, resumed_step=resumed, config={})
        for step in steps:
            tracker.write({"epoch": 0, "step": step, "train_loss": 100.0 * resumed + step, "lr": 0.5})
        tracker.close(failed=False)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"epoch", "train_loss", "lr"}
    read = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert read == [(1, 1), (2, 2), (3, 3), (4, 304), (5, 305), (6, 306), (7, 307), (8, 308)]


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_code: int | None = None

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], FakeRun]]:
    """A FAKE of the part of wandb's interface that is used: the package is 100 MB and no test dependency. What it is
    called with is recorded; that the real package takes it is not tested here."""
    runs: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**options: Any) -> FakeRun:
        runs.append((options, FakeRun()))
        return runs[-1][1]

    module = ModuleType("wandb")
    vars(module).update(init=init, Settings=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path, wandb: list[tuple[dict[str, Any], FakeRun]]) -> None:
    options = LogOptions(wandb="imagenet")
    for failed in (True, False):
        (tracker,) = open_trackers(options, tmp_path, resumed_step=0, config={"seed": 1})
        tracker.write({"epoch": 0, "step": 7, "train_loss": 2.5})
        tracker.close(failed=failed)
    (first, killed), (second, finished) = wandb
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("imagenet", tmp_path.name, {"seed": 1})
    assert first["settings"].console == "off"
    assert killed.logged == [(7, {"epoch": 0, "train_loss": 2.5})]
    assert (killed.exit_code, finished.exit_code) == (1, 0)
    (tmp_path / "other").mkdir()
    open_trackers(options, tmp_path / "other", resumed_step=0, config={})
    assert wandb[2][0]["id"] != first["id"]


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [
        ("torch.utils.tensorboard", LogOptions(tensorboard=True), "log.tensorboard = True"),
        ("wandb", LogOptions(wandb="imagenet"), "log.wandb = 'imagenet'"),
    ],
)
def test_a_missing_package(
    module: str, options: LogOptions, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{extra}: .*pip install ") as caught:
        open_trackers(options, tmp_path, resumed_step=0, config={})
    assert "\n" not in str(caught.value)
