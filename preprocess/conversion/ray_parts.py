"""Runs the parts of a conversion on a Ray cluster (https://docs.ray.io)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from sdpnet.pipelines.errors import BackendMissingError, UserError
from sdpnet.pipelines.lasting_output import print_note
from sdpnet.pipelines.terminal.remedy import install_extra

__all__ = ["run_on_ray"]


def run_on_ray(tasks: Sequence[Callable[[], int]], num_cpus: int) -> None:
    """Runs each task as a Ray task. A task returns its number of images.

    Ray connects to the cluster given by RAY_ADDRESS, or is started on this machine. If a machine is lost, its task runs
    again on another one. The first task that fails ends the others; their work stays for the next run.

    Args:
        tasks: the tasks.
        num_cpus: the number of cores that a task takes.

    Raises:
        BackendMissingError: Ray is not installed.
        UserError: a task failed with a `UserError`.
    """
    try:
        import ray
    except ImportError as error:
        raise BackendMissingError(
            f"--ray: Ray cannot be imported ({error}); to mend it: {install_extra('ray')}"
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}})
    try:
        run = ray.remote(num_cpus=num_cpus)(_call)
        pending = {run.remote(task): number for number, task in enumerate(tasks, 1)}
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            number = pending.pop(done)
            try:
                count = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(f"part {number}/{len(tasks)}: {error.cause}") from None
                raise
            print_note(f"part {number}/{len(tasks)}: {count:,} images")
    finally:
        if started:
            ray.shutdown()


def _call(task: Callable[[], int]) -> int:
    return task()
