"""The function of a process in `forked.run_group` that runs several trainings, one after the other."""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import replace
from typing import Any
from unittest import mock

import sdpnet.train
import sdpnet.training.scoring
import sdpnet.training.step
from sdpnet.checkpoints import directory as checkpoint_directory
from sdpnet.checkpoints.file import write_checkpoint
from sdpnet.checkpoints.model import Checkpoints
from sdpnet.config.load import load_config
from sdpnet.distributed.processes import join_group, leave_group
from sdpnet.execution.hardware import choose_step
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch
from sdpnet.reporting.reporter import Reporter

STOPS = {  # the place of a signal: it is sent when this function is called for the `number`th time
    "step": (Reporter, "advance"),
    "accumulation": (DeviceStage, "__call__"),
    "evaluation": (sdpnet.training.scoring, "evaluate"),
    "save": (Checkpoints, "save"),
}


def interrupted(where: str, number: int, signal_number: int) -> Any:
    """Replaces a function by one that sends a signal to this process when it is called for the `number`th time."""
    owner, name = STOPS[where]
    function, count = getattr(owner, name), [0]

    def calling(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal_number)
        return function(*arguments)

    return mock.patch.object(owner, name, calling)


def run_trainings(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs trainings one after the other. Returns the exit status and the samples of each step, for each case.

    The keys of a case, of which the last three are optional:

    - "arguments": the command line of `train`.
    - "stop": [place of `STOPS`, rank or ranks, number of the call, name of the signal (SIGTERM)], or None.
    - "nan": [rank, step]: the loss of this process is NaN in this step, counted from 1.
    - "asynchronous": whether steps do not wait for the device, as on GPUs.
    - "full": whether the first save fails for lack of space.
    """
    processes = join_group("cpu")
    rank = processes.shard.rank
    results = []
    parser = argparse.ArgumentParser()
    sdpnet.train.add_arguments(parser)
    for case in cases:
        arguments = parser.parse_args(case["arguments"])
        settings = [*arguments.set, f"data.path={arguments.data}", f"data.pipeline={arguments.pipeline}"]
        samples: list[list[int]] = []
        step = sdpnet.train.take_step
        nan = case.get("nan")

        def recording(
            run: Any, stream: Any, *rest: Any, step: Any = step, samples: Any = samples, nan: Any = nan
        ) -> Any:
            seen: list[int] = []
            loss = run.training_step.loss
            if nan == [rank, run.cursor.step + 1]:
                run.training_step.loss = lambda *of_part: loss(*of_part) * float("nan")

            def watched() -> Any:
                for batch in stream:
                    assert isinstance(batch, Batch)
                    seen.extend(batch.sample_ids.tolist())
                    yield batch

            samples.append(seen)
            try:
                return step(run, watched(), *rest)
            finally:
                run.training_step.loss = loss

        where, at, number, *name = case["stop"] or ("step", [], 0)
        ranks, sent = at if isinstance(at, list) else [at], signal.Signals[name[0] if name else "SIGTERM"]
        arguments.out.mkdir(exist_ok=True)
        config = load_config(arguments.config, settings)
        stop = interrupted(where, number if rank in ranks else 0, sent)

        def choose(*args: Any, asynchronous: bool = case.get("asynchronous", False), **options: Any) -> Any:
            return replace(choose_step(*args, **options), asynchronous=asynchronous)

        refusals = [None] if case.get("full") else []

        def write(path: Any, state: Any, refusals: Any = refusals) -> int:
            if refusals:
                refusals.pop()
                raise OSError(28, "No space left on device")
            return write_checkpoint(path, state)

        choices = mock.patch.object(sdpnet.training.step, "choose_step", choose)
        disk = mock.patch.object(checkpoint_directory, "write_checkpoint", write)
        with stop, choices, disk, mock.patch.object(sdpnet.train, "take_step", recording):
            status = sdpnet.train.train(config, arguments.out, resume=arguments.resume, processes=processes)
        results.append({"status": status, "samples": samples})
    leave_group()
    return results
