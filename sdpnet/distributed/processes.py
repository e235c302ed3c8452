"""The processes of one training run: who this one is, on which device, and what they agree on."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
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
    "Arriving",
    "Processes",
    "Vote",
    "Wish",
    "from_main",
    "join",
    "least",
    "leave",
    "most",
    "one_line_when_lost",
    "same_weights",
    "sum_on_device",
    "sum_over_processes",
    "total",
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


def join(device: str = "auto", timeout_seconds: float = 600) -> Processes:
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


def leave() -> None:
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


def total(count: int, processes: Processes) -> int:
    """The sum of `count` over all processes; every process must call it, and all get the same answer."""
    if processes.world_size == 1:
        return count
    return round(sum_over_processes(torch.tensor([float(count)], dtype=torch.float64), processes).item())


def from_main(value: int, processes: Processes) -> int:
    """The main process's value; every process must call it."""
    return total(value if processes.is_main else 0, processes)


def least(count: int, processes: Processes) -> int:
    """The smallest `count` of all processes; every process must call it, and all get the same answer."""
    return _reduced(count, dist.ReduceOp.MIN, processes)


def most(count: int, processes: Processes) -> int:
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


class Arriving:
    """A tensor's values on their way to the host: nobody waits until they are read."""

    def __init__(self, values: torch.Tensor) -> None:
        self._copy = values.to("cpu", non_blocking=True)  # pinned, of a GPU's
        self._copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    @property
    def here(self) -> bool:
        """Whether `read` would not wait."""
        return self._copied is None or self._copied.query()

    def read(self) -> Any:
        """Floats, in lists as the tensor's shape says. Waits for the copy alone, not for what the device was given to
        do after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.numpy().tolist()


class Wish(IntEnum):
    """What a process wishes after a step; the largest wish of all is granted."""

    GO_ON = 0
    SAVE = 1  # a save has failed, and is to be tried once more
    STOP = 2


class Vote:
    """The largest wish of any process, by every process's vote after each step; all get the same answer.

    With `late` a vote of several processes is counted on the device and read after the next step: nobody waits for it.
    """

    def __init__(self, processes: Processes, *, late: bool) -> None:
        self._processes, self._late = processes, late
        self._earlier: Arriving | None = None

    def __call__(self, wish: Wish) -> Wish:
        if not self._late or self._processes.world_size == 1:
            return Wish(most(wish, self._processes))
        votes = torch.zeros(len(Wish), device=self._processes.device)
        votes[wish] = 1
        earlier, self._earlier = self._earlier, Arriving(sum_on_device(votes, self._processes))
        if earlier is None:
            return Wish.GO_ON
        return max(granted for granted, count in zip(Wish, earlier.read(), strict=True) if count)
