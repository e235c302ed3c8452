"""Runs several trainings, one after the other, in processes that meet once.

It imports everything once. Then it takes launches from standard input, a JSON line each: [CASES.json, world size,
port]; forks the processes of each, which write to CASES.RANK.txt what they print; and answers with their exit statuses.

CASES.json: a list of {"arguments": [...] for `train`, "stop": [where, rank or ranks, number, signal (SIGTERM)] or null,
"nan": [rank, step] or absent, "late": true for steps that do not wait for the device, as on GPUs}. A process writes
CASES.RANK.json: for each case the exit status and the samples of each step. In step `step` (from 1) of "nan" the loss
of that process is NaN.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pipelines.native_pipeline
import pipelines.torchvision_pipeline  # noqa: F401 (once for all)
import sdpnet.setup
import sdpnet.train
from pipelines.augment import DeviceStage
from pipelines.contract import Batch
from sdpnet.checkpoint import Checkpoints
from sdpnet.config import load_config
from sdpnet.distributed import join, leave
from sdpnet.hardware import choose_step
from sdpnet.report import Reporter

STOPS = {  # where the signal comes: what is called then, for the `number`th time
    "step": (Reporter, "advance"),
    "accumulation": (DeviceStage, "__call__"),
    "evaluation": (sdpnet.train, "evaluate"),
    "save": (Checkpoints, "save"),
}


def interrupted(where: str, number: int, signal_number: int) -> Any:
    """Replaces a function by one that sends this process a signal when it is called for the `number`th time."""
    owner, name = STOPS[where]
    function, count = getattr(owner, name), [0]

    def calling(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal_number)
        return function(*arguments)

    return mock.patch.object(owner, name, calling)


def main(cases: Path, rank: int, world_size: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    processes = join("cpu")
    results = []
    parser = argparse.ArgumentParser()
    sdpnet.train.add_arguments(parser)
    for case in json.loads(cases.read_text()):
        arguments = parser.parse_args(case["arguments"])
        settings = [*arguments.set, f"data.path={arguments.data}", f"data.pipeline={arguments.pipeline}"]
        samples: list[list[int]] = []
        step = sdpnet.train.take_step
        nan = case.get("nan")

        def recording(
            run: Any, stream: Any, *rest: Any, step: Any = step, samples: Any = samples, nan: Any = nan
        ) -> Any:
            seen: list[int] = []
            loss = run.loss
            if nan == [rank, run.cursor.step + 1]:
                run.loss = lambda *of_part: loss(*of_part) * float("nan")

            def watched() -> Any:
                for batch in stream:
                    assert isinstance(batch, Batch)
                    seen.extend(batch.sample_ids.tolist())
                    yield batch

            samples.append(seen)
            try:
                return step(run, watched(), *rest)
            finally:
                run.loss = loss

        where, at, number, *name = case["stop"] or ("step", [], 0)
        ranks, sent = at if isinstance(at, list) else [at], signal.Signals[name[0] if name else "SIGTERM"]
        arguments.out.mkdir(exist_ok=True)
        config = load_config(arguments.config, settings)
        stop = interrupted(where, number if rank in ranks else 0, sent)

        def choose(*args: Any, late: bool = case.get("late", False), **options: Any) -> Any:
            return replace(choose_step(*args, **options), late=late)

        choices = mock.patch.object(sdpnet.setup, "choose_step", choose)
        with stop, choices, mock.patch.object(sdpnet.train, "take_step", recording):
            status = sdpnet.train.train(config, arguments.out, resume=arguments.resume, processes=processes)
        results.append({"status": status, "samples": samples})
    leave()
    cases.with_suffix(f".{rank}.json").write_text(json.dumps(results))


def fork(cases: Path, rank: int, world_size: int) -> int:
    """Starts one process; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(cases.with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for descriptor, replacement in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(replacement, descriptor)
        main(cases, rank, world_size)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    for line in sys.stdin:
        cases, world_size, os.environ["MASTER_PORT"] = json.loads(line)
        children = [fork(Path(cases), rank, world_size) for rank in range(world_size)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    serve()
