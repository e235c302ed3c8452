"""Continuing a run from its newest checkpoint, and the messages for a run that has stopped or is finished."""

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
from sdpnet.pipelines.terminal.quiet import is_quiet
from sdpnet.training.run_state import Run
from sdpnet.training.setup import prepare

__all__ = ["begin_or_continue", "finished_before", "how_to_continue", "next_commands", "resume_command"]


def begin_or_continue(config: Config, out: Path, *, resume: bool, processes: Processes) -> tuple[Run, float | None]:
    """Starts a new run in `out` or, with `resume`, continues the one there from its newest checkpoint.

    Returns:
        The run, and the score of the checkpoint that it continues from, or None.

    Raises:
        UserError: there is a checkpoint but `resume` is False, or the checkpoint does not belong to this config, data
            and model.
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
    """Loads a checkpoint into `run`, after checks of classes and order; changes since then go to the run's notes."""
    # Classes and order are checked before any weight is loaded. A run with other classes or another order would train
    # on without an error, and its result would be wrong.
    data = run.config.data.path
    allow = run.config.train.other_classes == "keep"
    classes = require_same_classes(path, state, run.train_loader.manifest.classes, data, allow=allow)
    spread = require_same_order(path, state, run.order, run.world)
    run.load(path, state)
    run.notes += filter(None, [spread, classes, changed_images(state, run.data, data)])
    run.notes += changed_keys(state, asdict(run.config), Path.cwd())
    run.notes.append(f"resumed from {path} (epoch {run.cursor.epoch + 1}, step {run.cursor.step})")


def finished_before(run: Run, out: Path, score: float | None, require_own: Callable[[], object]) -> int:
    """Reports that a resumed run is finished, and writes its final files where they are missing.

    A run may be killed between its last checkpoint and the files that follow it: `best.json` and the finished model.

    Args:
        score: the score of the last checkpoint, or None.

    Returns:
        The exit status, 0.
    """
    epochs, wanted, options = run.cursor.epoch, run.config.train.epochs, run.config.train
    say = lambda text: _say(text, run.processes)  # noqa: E731
    say(f"{out}: the run is finished: epoch {epochs} of {wanted}, {run.cursor.step} steps; nothing is left to do")
    say(f"to train longer: {how_to_continue(run, out)} --set train.epochs={epochs + max(1, epochs // 10)}")
    if run.processes.is_main:
        directory = out / "checkpoints"
        checkpoints = Checkpoints(directory, options.keep_checkpoints, options.keep_best, False, say, require_own)
        checkpoints.finish(run.cursor.step, score)
        require_own()
        if run.save_model(out):
            say(f"done: {out / 'model.safetensors'}")
    for line in next_commands(out):
        say(line)
    return 0


def how_to_continue(run: Run, out: Path) -> str:
    """The command that continues the run. The options of torchrun are not known here, so they are not repeated."""
    return resume_command(out) if run.processes.world_size == 1 else "the same command with --resume"


def resume_command(out: Path) -> str:
    return f"sdpnet train --resume --out {shlex.quote(str(out))}"


def next_commands(out: Path) -> list[str]:
    """The line that names the next commands after a training; no line with `--quiet`."""
    run = shlex.quote(str(out))
    return [] if is_quiet() else [f"next: sdpnet report {run}, or: sdpnet predict --model {run} IMAGE"]
