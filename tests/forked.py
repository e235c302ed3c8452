"""Groups of processes, forked from a server that has imported what they need: alone, each takes seconds for that."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["run_group"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["sdpnet.train", "pipelines.native_pipeline", "pipelines.torchvision_pipeline"])


def run_group(function: Callable[..., Any], *args: Any, world_size: int, scratch: Path) -> list[Any]:
    """What `function(*args)` returns in each process of a group that `sdpnet.distributed.join` finds.

    Files go to `scratch`, a directory that need not be there. Fails with what all have printed when one does.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    printed, returned = ([scratch / f"{what}.{rank}" for rank in range(world_size)] for what in ("printed", "returned"))
    processes = []
    for rank in range(world_size):
        group = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        arguments = (function, args, group, printed[rank], returned[rank])
        processes.append(_CONTEXT.Process(target=_member, args=arguments))
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert statuses == [0] * world_size, "\n".join(path.read_text() for path in printed if path.exists())
    return [pickle.loads(path.read_bytes()) for path in returned]


def _member(
    function: Callable[..., Any], args: tuple[Any, ...], group: dict[str, int], printed: Path, returned: Path
) -> None:
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    try:
        returned.write_bytes(pickle.dumps(function(*args)))
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
