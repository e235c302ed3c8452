"""The processes of one training run: who this one is, on which device, and what they agree on."""

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
    "one_line_when_lost",
    "same_weights",
    "sum_on_device",
    "sum_over_processes",
    "wait_for_all",
]


@dataclass(frozen=True)
class Processes:
    """This process among all: its part of every batch and its device."""

    shard: ShardOptions
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.shard.rank == 0

    @property
    def world_size(self) -> int:
        return self.shard.world_size


def join_group(device: str = "auto", timeout_seconds: float = 600) -> Processes:
    """Joins the group that torchrun describes in the environment, or stands alone without one.

    `device` is "auto" (CUDA when there is a card), "cuda" or "cpu". NCCL connects GPUs, gloo CPUs. A process that waits
    for another one longer than `timeout_seconds` gives up.
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
        # torchrun may keep its store over a restart: processes then found the addresses of killed ones, and hung.
        store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return Processes(ShardOptions(rank, world_size, local_world_size), chosen)


def _number(variable: str) -> int:
    """A count or number that torchrun sets; without torchrun that of a process that stands alone."""
    text = os.environ.get(variable, str(int(variable.endswith("WORLD_SIZE"))))
    least = int(variable.endswith("WORLD_SIZE"))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{variable} = {text!r}: must be a number from {least} on, as torchrun sets it")
    return int(text)


def leave_group() -> None:
    """Leaves the group, if there is one, and ends its threads."""
    if dist.is_initialized():
        dist.destroy_process_group()


_TIMEOUT = re.compile(r"timed?[ -]?out", re.IGNORECASE)
_OF_OTHER_PROCESSES = re.compile(r"gloo|connection (closed|reset)", re.IGNORECASE)


@contextlib.contextmanager
def one_line_when_lost(timeout_seconds: float) -> Iterator[None]:
    """Turns torch's errors about a process that has ended, or keeps silent, into a `UserError`.

    gloo's are plain `RuntimeError`s. NCCL's come on a thread of its own, which ends the process with NCCL's report.
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
    """Gives every process the main process's buffers (batch-norm statistics), so that all evaluate one model."""
    if processes.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def sum_on_device(values: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The element-wise sum over all processes, in place; on GPUs the host does not wait for it."""
    if processes.world_size > 1:
        dist.all_reduce(values)
    return values


class AsyncRead:
    """A tensor's values on their way to the host. Starting the copy waits for nothing; `read` waits for the copy."""

    def __init__(self, values: torch.Tensor) -> None:
        self._copy = values.to("cpu", non_blocking=True)  # pinned, where the values are a GPU's
        self._copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    @property
    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return self._copied is None or self._copied.query()

    def read(self) -> Any:
        """Floats, in lists of the tensor's shape. Waits for the copy, not for later work of the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.numpy().tolist()


class Wish(IntEnum):
    """What a process wishes after a step; the largest wish of all is granted."""

    GO_ON = 0
    SAVE = 1  # a save has failed, and is to be tried once more
    STOP = 2


class Vote:
    """The largest wish of any process, decided by all processes after each step; all get the same answer.

    With `asynchronous` the votes of several processes are counted on the device and read after the next step, so that
    nobody waits for them.
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
