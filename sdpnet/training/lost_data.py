"""A shard that is cut, replaced or damaged while a training reads it: what was trained is saved before the run ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import suppress

from sdpnet.optim.nonfinite import NonFinite
from sdpnet.pipelines.errors import ShardError
from sdpnet.training.setup import Run

__all__ = ["saved_when_data_is_lost"]


@contextlib.contextmanager
def saved_when_data_is_lost(run: Run, save: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
    """Within it, a `ShardError` first saves the run as it was after the last finished step, and then goes on.

    Each process that gets the error does what it can alone: no other one is waited for. `save` saves in the main
    process.
    """
    try:
        yield
    except ShardError:
        run.guard.undo()  # the batch-norm statistics, which earlier batches of the unfinished step have moved
        with suppress(NonFinite):
            run.guard.told(all_steps=True)
        save()
        if run.processes.is_main:
            say(f"the data failed after step {run.cursor.step}, which is saved; --resume goes on from there")
        raise
