"""A run that was killed where its files do not agree with each other goes on to the files of an unbroken run.

`Killed` stands for SIGKILL: nothing catches it. tests/fault_matrix kills real processes, at random points.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import equal
from trainings import arguments, metrics, same_run

import sdpnet.checkpoints.model
import sdpnet.train
import sdpnet.training.run_state
import sdpnet.training.scoring
from sdpnet.checkpoints import directory as checkpoint_directory
from sdpnet.checkpoints.model import load_checkpoint
from sdpnet.reporting.reporter import Reporter
from sdpnet.train import main

SETTINGS = ("train.checkpoint_interval=2", "train.keep_checkpoints=2", "train.async_checkpoints=false", "ema.decay=0.9")
FILES = ("best.json", "per_class.csv", "model.json", "model.safetensors")


class Killed(BaseException):
    pass


def killed_at(
    owner: Any, name: str, number: int, *, after: bool, only: str = ""
) -> Callable[[pytest.MonkeyPatch], None]:
    """Makes the `number`th call of a function the last thing that the process does, or with `after` what comes after
    it; `only` counts those with a path of this name."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        function, count = getattr(owner, name), [0]

        def calling(*of_call: Any, **named: Any) -> Any:
            count[0] += not only or any(isinstance(given, Path) and given.name == only for given in of_call)
            if count[0] == number and not after:
                raise Killed
            result = function(*of_call, **named)
            if count[0] == number:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, calling)

    return patch


POINTS = {
    "between an evaluation and its checkpoint": killed_at(Reporter, "evaluation", 1, after=True),
    "between the last evaluation and its checkpoint": killed_at(Reporter, "evaluation", 2, after=True),
    "before an evaluation": killed_at(sdpnet.training.scoring, "evaluate", 1, after=False),
    "between a checkpoint and the best": killed_at(
        checkpoint_directory, "publish_bytes", 1, after=False, only="best.json"
    ),
    "before what is removed": killed_at(checkpoint_directory.Checkpoints, "_remove_old", 4, after=False),
    "before what is removed last": killed_at(checkpoint_directory.Checkpoints, "_remove_old", 8, after=False),
    "between weights and card": killed_at(sdpnet.checkpoints.model, "publish_bytes", 2, after=False),
}


@pytest.fixture(scope="module")
def whole(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(shard_set, out, *SETTINGS)) == 0
    return out


def require_the_same(out: Path, whole: Path) -> None:
    same_run(whole, out)
    for one in sorted(whole.rglob("*")):
        other = out / one.relative_to(whole)
        if one.suffix == ".pt":
            assert equal(load_checkpoint(one), load_checkpoint(other)), one.name
        elif one.name in FILES:
            assert one.read_bytes() == other.read_bytes(), one.name
    assert sorted(os.listdir(out / "checkpoints")) == sorted(os.listdir(whole / "checkpoints"))


@pytest.mark.parametrize("point", POINTS)
def test_it_goes_on_to_the_same_files(
    point: str, whole: Path, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(shard_set, tmp_path, *SETTINGS)
    with monkeypatch.context() as patched:
        POINTS[point](patched)
        with pytest.raises(Killed):
            main(command)
    assert main([*command, "--resume"]) == 0
    require_the_same(tmp_path, whole)


def test_a_longer_run_that_was_killed_before_its_model(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of the shorter run is still there then, and must not be taken for the longer one's."""
    command = arguments(shard_set, tmp_path, *SETTINGS)
    assert main([*command, "--set", "train.epochs=1"]) == 0
    with monkeypatch.context() as patched:
        killed_at(sdpnet.training.run_state, "save_model", 1, after=False)(patched)
        with pytest.raises(Killed):
            main([*command, "--resume"])
    assert main([*command, "--resume"]) == 0
    found = [(tmp_path / name).read_bytes() for name in FILES[2:]]
    for name in FILES[2:]:
        (tmp_path / name).unlink()
    assert main([*command, "--resume"]) == 0
    assert [(tmp_path / name).read_bytes() for name in FILES[2:]] == found, "written anew from the last checkpoint"


def test_the_last_learning_rates_are_kept(tmp_path: Path) -> None:
    """A run that continues at an epoch's end saves again before its first step."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.25)
    saved = torch.optim.AdamW([parameter], lr=0.125, weight_decay=0.0).state_dict()
    sdpnet.checkpoints.model.load_optimizer(optimizer, saved, tmp_path)
    assert optimizer.param_groups[0]["lr"] == 0.125 and optimizer.param_groups[0]["weight_decay"] == 0.25


def harmed(out: Path, how: str) -> None:
    if how == "removed":
        shutil.rmtree(out)
    else:
        out.rename(out.with_name("moved"))
        if how == "replaced":
            (out / "checkpoints").mkdir(parents=True)
            (out / "metrics.jsonl").write_text("of another run\n")


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_run_whose_folder_goes_ends_in_one_line(
    how: str, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes nothing into what takes its place."""
    out = tmp_path / "run"
    advance, count = Reporter.advance, [0]

    def counting(self: Reporter) -> None:
        advance(self)
        count[0] += 1
        if count[0] == 3:
            harmed(out, how)

    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "advance", counting)
        assert main(arguments(shard_set, out, *SETTINGS)) == 2
    error = capsys.readouterr().err
    reason = "replaced by another one" if how == "replaced" else "removed or renamed"
    assert error.startswith(f"error: {out}/checkpoints/step_0000000") and error.count("\n") == 1
    assert f"cannot be written (the run's folder was {reason})" in error
    if how == "replaced":
        assert (out / "metrics.jsonl").read_text() == "of another run\n"
        assert {path.name for path in out.rglob("*")} == {"checkpoints", "metrics.jsonl"}
    else:
        assert not out.exists()
    if how != "removed":
        assert [line["step"] for line in metrics(tmp_path / "moved")] == [1, 2]
        assert (tmp_path / "moved" / "checkpoints" / "step_00000002.pt").is_file()
        assert not (tmp_path / "moved" / ".lock").exists()
