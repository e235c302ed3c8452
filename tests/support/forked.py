"""Groups of processes that are forked from a server. It has done their imports, which would take each one seconds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launches import free_port, member

__all__ = ["run_group"]

_SECONDS = 400  # processes that take longer hang; less than pytest's faulthandler_timeout, which ends all tests
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["sdpnet.train", "sdpnet.pipelines.executors.native", "sdpnet.pipelines.executors.torchvision"]
)


def run_group(function: Callable[..., Any], *args: Any, world_size: int, scratch: Path) -> list[Any]:
    """Calls `function(*args)` in each process of a group that `sdpnet.distributed.processes.join_group` can join.

    If a process fails, the assertion shows the output of all processes.

    Args:
        scratch: a directory for files; it is created if it does not exist.

    Returns:
        The result of each process.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    port = free_port()
    printed, returned = ([scratch / f"{what}.{rank}" for rank in range(world_size)] for what in ("printed", "returned"))
    processes = []
    try:
        for rank in range(world_size):
            environment = {**os.environ, **member(rank, world_size, port)}
            arguments = (function, args, environment, printed[rank], returned[rank])
            processes.append(_CONTEXT.Process(target=_member, args=arguments))
            processes[-1].start()
        until = time.monotonic() + _SECONDS
        for process in processes:
            process.join(max(0, until - time.monotonic()))
        statuses = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    assert statuses == [0] * world_size, "\n".join(path.read_text() for path in printed if path.exists())
    return [pickle.loads(path.read_bytes()) for path in returned]


def _member(
    function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], printed: Path, returned: Path
) -> None:
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        returned.write_bytes(pickle.dumps(function(*args)))
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
