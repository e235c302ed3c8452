"""The processes of one training: the rank and device of this process, and values that all processes agree on."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

__all__ = [
    "AsyncRead",
    "Processes",
    "Vote",
    "Wish",
    "count_over_processes",
    "from_main",
    "join_group",
    "leave_group",
    "max_over_processes",
    "min_over_processes",
    "report_lost_process",
    "same_weights",
    "sum_on_device",
    "sum_over_processes",
    "wait_for_all",
]


@dataclass(frozen=True)
class Processes:
    """The place of this process among all: its part of every batch, and its device."""

    shard: ShardOptions
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.shard.rank == 0

    @property
    def world_size(self) -> int:
        return self.shard.world_size


def join_group(device: str = "auto", timeout_seconds: float = 600) -> Processes:
    """Joins the process group that torchrun describes in the environment; without torchrun there is one process.

    Args:
        device: "auto" (CUDA where torch finds a GPU), "cuda" or "cpu". NCCL connects GPUs, gloo connects CPUs.
        timeout_seconds: the time for which a process waits for another one before it fails.

    Raises:
        UserError: the environment is not valid, or there is no GPU for this process.
    """
    rank, world_size, local_rank, local_world_size = map(
        _number, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK = {rank}, WORLD_SIZE = {world_size}: must be 0 <= RANK < WORLD_SIZE; start it by torchrun"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda': this torch sees no CUDA device; use train.device=cpu or auto")
    if device != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"process {local_rank} on this machine has no GPU: there are {count}; lower --nproc_per_node"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    if world_size > 1:
        # torch._dynamo imports this module, whose functions have the group of that moment as a default argument. An
        # import after the group was made keeps the group and its threads alive until the interpreter ends, and one of
        # them may then end the process with SIGABRT ("terminate called without an active exception").
        importlib.import_module("torch.distributed.nn.functional")
        backend, timeout = "nccl" if chosen.type == "cuda" else "gloo", timedelta(seconds=timeout_seconds)
        store, *_ = next(iter(dist.rendezvous("env://", rank, world_size, timeout=timeout)))
        # torchrun may keep its store over a restart. Without a prefix for each restart, processes found the addresses
        # of killed ones in it, and hung.
        store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Processes(ShardOptions(rank, world_size, local_world_size), chosen)


def _number(variable: str) -> int:
    """The value of one of torchrun's variables; without torchrun, its value in a group of one process."""
    smallest = int(variable.endswith("WORLD_SIZE"))
    text = os.environ.get(variable, str(smallest))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < smallest:
        raise UserError(f"{variable} = {text!r}: must be a number from {smallest} on, as torchrun sets it")
    return int(text)


def leave_group() -> None:
    """Leaves the group, if there is one, and ends its threads."""
    if dist.is_initialized():
        dist.destroy_process_group()


_TIMEOUT = re.compile(r"timed?[ -]?out", re.IGNORECASE)
_OF_OTHER_PROCESSES = re.compile(r"gloo|connection (closed|reset)", re.IGNORECASE)


@contextlib.contextmanager
def report_lost_process(timeout_seconds: float) -> Iterator[None]:
    """Turns torch's errors about a process that has ended or does not answer into a `UserError`.

    gloo raises plain `RuntimeError`s, which only their text identifies. NCCL's errors do not get here: they occur on a
    thread of NCCL's, which ends the process with a report of its own.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not _OF_OTHER_PROCESSES.search(text):
            raise
        rank = f"process {os.environ.get('RANK', '0')}"
        if _TIMEOUT.search(text):
            raise UserError(
                f"{rank}: no answer from another process for {timeout_seconds:g} s (train.timeout_seconds): it hangs, "
                "was stopped or never began; continue from the last checkpoint with --resume"
            ) from None
        raise UserError(
            f"{rank}: another process has ended, and says why itself unless it was killed; continue from the last "
            "checkpoint with --resume"
        ) from None


def count_over_processes(count: int, processes: Processes) -> int:
    """The sum of `count` over all processes; every process must call it, and all get the same answer."""
    if processes.world_size == 1:
        return count
    return round(sum_over_processes(torch.tensor([float(count)], dtype=torch.float64), processes).item())


def wait_for_all(processes: Processes) -> None:
    """Waits until every process has called it."""
    count_over_processes(0, processes)


def from_main(value: int, processes: Processes) -> int:
    """The main process's value; every process must call it."""
    return count_over_processes(value if processes.is_main else 0, processes)


def min_over_processes(count: int, processes: Processes) -> int:
    """The smallest `count` of all processes; every process must call it, and all get the same answer."""
    return _reduced(count, dist.ReduceOp.MIN, processes)


def max_over_processes(count: int, processes: Processes) -> int:
    """The largest `count` of all processes; every process must call it, and all get the same answer."""
    return _reduced(count, dist.ReduceOp.MAX, processes)


def _reduced(count: int, operation: dist.ReduceOp.RedOpType, processes: Processes) -> int:
    if processes.world_size > 1:
        value = torch.tensor(count, device=processes.device)
        dist.all_reduce(value, operation)
        count = int(value.item())
    return count


def sum_over_processes(values: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The element-wise sum over all processes, on the CPU."""
    if processes.world_size > 1:
        values = values.to(processes.device)
        dist.all_reduce(values)
    return values.cpu()


def same_weights(model: nn.Module, processes: Processes) -> None:
    """Copies the main process's buffers (batch-norm statistics) to every process, so that all evaluate one model."""
    if processes.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def sum_on_device(values: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The element-wise sum over all processes, in place; on GPUs the host does not wait for it."""
    if processes.world_size > 1:
        dist.all_reduce(values)
    return values


class AsyncRead:
    """A tensor's values, copied to the host asynchronously: only `read` waits for the copy."""

    def __init__(self, values: torch.Tensor) -> None:
        self._copy = values.to("cpu", non_blocking=True)  # in pinned memory, if the values are on a GPU
        self._copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    @property
    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return self._copied is None or self._copied.query()

    def read(self) -> Any:
        """The values as nested lists of floats. Waits for the copy, but for no other work of the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.numpy().tolist()


class Wish(IntEnum):
    """The wish of a process after a step. The largest wish of all processes is carried out by all of them."""

    GO_ON = 0
    SAVE = 1  # a save has failed and should be tried once more
    STOP = 2


class Vote:
    """Decides on the largest wish of any process. Every process calls it after each step; all get the same answer.

    With `asynchronous` the votes are counted on the device and read after the next step, so that no process waits for
    them. A decision then comes one step later.
    """

    def __init__(self, processes: Processes, *, asynchronous: bool) -> None:
        self._processes = processes
        self._unread = 1 if asynchronous else 0  # the number of newest counts that are not read
        self._counted: deque[AsyncRead] = deque()

    def __call__(self, wish: Wish) -> Wish:
        if self._processes.world_size == 1:
            return wish
        votes = torch.zeros(len(Wish), device=self._processes.device)
        votes[wish] = 1
        self._counted.append(AsyncRead(sum_on_device(votes, self._processes)))
        if len(self._counted) <= self._unread:
            return Wish.GO_ON
        counts = self._counted.popleft().read()
        return max(granted for granted, count in zip(Wish, counts, strict=True) if count)
