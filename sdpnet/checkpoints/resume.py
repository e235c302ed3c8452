"""The checks before a run continues: its newest readable checkpoint, and whether the order of samples is the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdpnet.checkpoints.directory import list_checkpoints
from sdpnet.checkpoints.file import load_checkpoint
from sdpnet.distributed.processes import Processes, max_over_processes, min_over_processes
from sdpnet.pipelines.errors import UserError

__all__ = ["load_newest", "require_same_order", "require_same_step"]


def load_newest(directory: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Loads the newest checkpoint in `directory` that can be read.

    A damaged checkpoint is skipped, so that the damage costs only the steps since the checkpoint before it.

    Args:
        say: is called with one line of text for each checkpoint that is damaged.

    Returns:
        Its path and its state, or None where there is no checkpoint.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    found = list_checkpoints(directory)
    for path in reversed(found):
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            say(f"{error}; trying the one before it")
    if found:
        raise UserError(
            f"{directory}: none of its {len(found)} checkpoints can be read; start a new run in another --out"
        )
    return None


def require_same_order(
    path: Path, state: Mapping[str, Any], order: Mapping[str, int | str], world: Mapping[str, int]
) -> str | None:
    """Checks that samples come in the same order as in the run that saved `state` at `path`.

    Args:
        order: the values that the order depends on: seed, global_batch_size, num_samples, data.order and
            data.sampling. Checkpoints that are older than data.order do not have it and are not checked for it; those
            that are older than data.sampling used every sample once.
        world: the spread of a global batch over the processes: world_size, batch_size_per_gpu and accumulate. It may
            change.

    Returns:
        A line that says how `world` has changed, or None.

    Raises:
        UserError: a value of `order` has changed. The message names all that have.
    """
    # A batch of the plan is cut by its global size only. A different number of processes with the same global batch
    # therefore sees the same samples in the same steps, which is why `world` may change and `order` may not.
    was = state["order"]
    was = {"data.order": order.get("data.order"), "data.sampling": "every sample once", **was}
    changed = [name for name, value in order.items() if was.get(name) != value]
    if changed:
        differences = ", ".join(f"with {name} {was.get(name)}, not {order[name]}" for name in changed)
        advice = ""
        processes, batch = world["world_size"], was.get("global_batch_size")
        if changed == ["global_batch_size"] and isinstance(batch, int) and batch % processes == 0:
            advice = f"; {processes} processes need data.batch_size_per_gpu x train.accumulate = {batch // processes}"
        elif "num_samples" in changed:
            advice = "; pass the --data of that run, or begin a new --out with train.start_from=RUN"
        raise UserError(f"{path}: was trained {differences}: it cannot be continued exactly{advice}")
    before = state.get("world")
    if before is None or all(before.get(name) == value for name, value in world.items()):
        return None
    return f"the same global batch of {order['global_batch_size']}: was {_spread(before)}, now {_spread(world)}"


def require_same_step(step: int, out: Path, processes: Processes) -> None:
    """Raises `UserError` if the processes are at different steps. Every process must call it.

    Where `out` is not on a disk that the machines share, each machine finds other checkpoints, or none.
    """
    if min_over_processes(step, processes) != max_over_processes(step, processes):
        raise UserError(f"{out}: not the same checkpoints for all processes; --out must be on a disk that they share")


def _spread(world: Mapping[str, Any]) -> str:
    processes, accumulate = world.get("world_size"), world.get("accumulate")
    return (
        f"{processes} process{'' if processes == 1 else 'es'} x {world.get('batch_size_per_gpu')}"
        f"{f' x {accumulate} accumulated' if accumulate != 1 else ''}"
    )
