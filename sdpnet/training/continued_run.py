"""What continues a run, and what is said where one has stopped or is finished."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdpnet.checkpoints.changes import changed_images, changed_keys, require_same_classes
from sdpnet.checkpoints.model import (
    Checkpoints,
    latest_checkpoint,
    load_newest,
    require_same_order,
    require_same_step,
)
from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.pipelines.errors import UserError, printable
from sdpnet.training.run_state import Run
from sdpnet.training.setup import prepare

__all__ = ["begin_or_continue", "finished_before", "how_to_continue", "next_commands", "resume_command"]


def begin_or_continue(config: Config, out: Path, *, resume: bool, processes: Processes) -> tuple[Run, float | None]:
    """The run in `out`: a new one, or with `resume` continued from its newest checkpoint, if there is one.

    Returns it with the score of that checkpoint, or None. Raises `UserError` when there is a checkpoint but `resume` is
    not given, or when the checkpoint is not of this run.
    """
    directory = out / "checkpoints"
    if not resume and latest_checkpoint(directory) is not None:
        raise UserError(f"{out}: holds a run already; pass --resume to continue it, or another --out")
    newest = load_newest(directory, lambda text: _say(text, processes)) if resume else None
    score = newest[1].get("score") if newest else None
    run = prepare(config, processes, begins=newest is None, threads=newest[1].get("threads") if newest else None)
    if newest is not None:
        _continue_from(run, *newest)
    elif resume:
        run.notes.append(f"no checkpoint in {directory} yet: the run begins")
    require_same_step(run.cursor.step, out, processes)
    return run, score


def _say(text: str, processes: Processes) -> None:
    if processes.is_main:
        print(printable(text))


def _continue_from(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Loads what a run saved; the run's notes say what has changed since."""
    data = run.config.data.path
    allow = run.config.train.other_classes == "keep"
    classes = require_same_classes(path, state, run.train_loader.manifest.classes, data, allow=allow)
    spread = require_same_order(path, state, run.order, run.world)
    run.load(path, state)
    run.notes += filter(None, [spread, classes, changed_images(state, run.data, data)])
    run.notes += changed_keys(state, asdict(run.config), Path.cwd())
    run.notes.append(f"resumed from {path} (epoch {run.cursor.epoch + 1}, step {run.cursor.step})")


def finished_before(run: Run, out: Path, score: float | None, require_own: Callable[[], object]) -> int:
    """Says that a resumed run has nothing left to do, and completes what a kill after its last checkpoint left undone.

    `score` is that of its last checkpoint. Returns the exit status, 0.
    """
    epochs, wanted, options = run.cursor.epoch, run.config.train.epochs, run.config.train
    say = lambda text: _say(text, run.processes)  # noqa: E731
    say(f"{out}: the run is finished: epoch {epochs} of {wanted}, {run.cursor.step} steps; nothing is left to do")
    say(f"to train on: {how_to_continue(run, out)} --set train.epochs={epochs + max(1, epochs // 10)}")
    if run.processes.is_main:
        directory = out / "checkpoints"
        checkpoints = Checkpoints(directory, options.keep_checkpoints, options.keep_best, False, say, require_own)
        checkpoints.finish(run.cursor.step, score)
        require_own()
        if run.save_model(out):
            say(f"done: {out / 'model.safetensors'}")
    say(next_commands(out))
    return 0


def how_to_continue(run: Run, out: Path) -> str:
    """The command to type; torchrun's own options are not known here."""
    return resume_command(out) if run.processes.world_size == 1 else "the same command with --resume"


def resume_command(out: Path) -> str:
    return f"train --resume --out {shlex.quote(str(out))}"


def next_commands(out: Path) -> str:
    """What a person may type after a training."""
    run = shlex.quote(str(out))
    return f"next: sdpnet report {run}, or: sdpnet predict --model {run} IMAGE"
