"""Saves of checkpoints in which one system call fails or the process is killed at it, each in a child process.

This module is both the test's side and the child's side, as `faults` is.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from faults import Commands, Ended, Fault, Injector, serve

from sdpnet.checkpoints.directory import Checkpoints
from sdpnet.pipelines.errors import run_command

SCORES = (0.2, 0.5, 0.3, 0.6, 0.4, 0.1)  # the scores of steps 1, 2, ...


def saves() -> Commands:
    """The commands that `save_steps` needs."""
    return Commands(__file__)


def save_steps(
    commands: Commands,
    out: Path,
    steps: tuple[int, ...] = (1, 2, 3, 4),
    *,
    asynchronous: bool,
    fault: Fault | None = None,
    seconds: float | None = None,
) -> Ended:
    """Saves `state_of(step)` for each step, and keeps the two newest checkpoints and the best one.

    The last step whose save has returned is written to the file `out`.progress. With `seconds`, further steps are saved
    until the process is killed after that time, with real syncs to the disk.
    """
    request: dict[str, Any] = {"out": str(out), "steps": steps, "asynchronous": asynchronous}
    request |= {"fault": fault and asdict(fault)} if seconds is None else {"seconds": seconds}
    return commands.request(request)


def state_of(step: int, elements: int = 300) -> dict[str, Any]:
    """A small checkpoint whose values all depend on its step."""
    weights = {"a": torch.full((elements,), float(step)), "b": torch.full((2, 3), -float(step))}
    sections: dict[str, Any] = {key: {} for key in ("scaler", "order", "evaluation", "card", "config", "world")}
    return {
        "version": 2,
        "model": weights,
        "ema": {"a": weights["a"] / 2, "b": weights["b"] / 2},
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step)), "exp_avg": weights["a"] * 3}},
            "param_groups": [],
        },
        **sections,
        "cursor": {"epoch": 0, "step_in_epoch": step, "step": step},
        "guard": {"torch": torch.full((16,), step % 256, dtype=torch.uint8)},
    }


def _save(request: dict[str, Any], report: int) -> int:
    endless = "seconds" in request
    injector = Injector(request["out"], None if endless or request["fault"] is None else Fault(**request["fault"]))
    progress = os.open(f"{request['out']}.progress", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    pwrite = os.pwrite
    if not endless:
        injector.install()

    def body() -> int:
        out = Path(request["out"])
        checkpoints = Checkpoints(out, 2, keep_best=True, asynchronous=request["asynchronous"])
        begun = checkpoints.newest()
        first = int(begun.stem.removeprefix("step_")) + 1 if begun and endless else 0
        for step in range(first, sys.maxsize) if endless else request["steps"]:
            state = state_of(step, 100_000 if endless else 300)
            checkpoints.save(step, state, SCORES[(step - 1) % len(SCORES)])
            pwrite(progress, b"%8d" % step, 0)
            state["model"]["a"].fill_(
                float("nan")
            )  # like the next step of training, which must not change what is saved
        checkpoints.close()
        return 0

    try:
        return run_command(body)
    finally:
        os.write(report, json.dumps(injector.counts).encode())


if __name__ == "__main__":
    torch.set_num_threads(1)  # because the process forks
    serve(_save)
