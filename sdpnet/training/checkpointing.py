"""The checkpoints of one run while it trains: saving, waiting, rolling back, and saving before the run ends early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from sdpnet.checkpoints.model import Checkpoints, load_newest
from sdpnet.distributed.processes import wait_for_all
from sdpnet.optim.nonfinite import NonFinite, Verdict
from sdpnet.pipelines.errors import ShardError
from sdpnet.reporting.reporter import Reporter
from sdpnet.training.run_state import Run

__all__ = ["Checkpointing"]


class Checkpointing:
    """Saves a run to `directory` and loads it from there. Only the main process writes; all processes call the same
    methods.

    Args:
        score: the score of the newest checkpoint of a run that continues, or None.
        require_own: raises if another process has taken over the run's directory.
    """

    def __init__(
        self, run: Run, directory: Path, reporter: Reporter, score: float | None, require_own: Callable[[], object]
    ) -> None:
        self._run, self._directory, self._reporter, self._require_own = run, directory, reporter, require_own
        self._checkpoints: Checkpoints | None = None
        options = run.config.train
        if run.processes.is_main:
            keep = options.keep_checkpoints, options.keep_best
            self._checkpoints = Checkpoints(directory, *keep, options.async_checkpoints, reporter.say, require_own)

        if self._checkpoints is not None and run.cursor.step:
            self._checkpoints.finish(run.cursor.step, score)

    def close(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written, so that saving should be tried again."""
        return self._checkpoints is not None and self._checkpoints.has_failed

    def save(self, score: float | None = None) -> None:
        """Saves the run as it is now. `score` is the top-1 accuracy, if it was just evaluated."""
        if self._checkpoints is not None:
            self._reporter.settle()
            self._checkpoints.save(self._run.cursor.step, {**self._run.state(), "score": score}, score)

    def wait(self) -> None:
        """Waits in all processes until the newest checkpoint is written."""
        if self._checkpoints is not None:
            self._checkpoints.wait()
        wait_for_all(self._run.processes)

    def save_model(self, out: Path) -> None:
        """Writes the finished model to `out`, in the main process, after its newest checkpoint is written."""
        if self._checkpoints is not None:
            self._checkpoints.wait()
            self._require_own()
            self._run.save_model(out)

    def apply(self, verdict: Verdict) -> None:
        """Reports what became of a step, and loads the newest checkpoint if the verdict is to roll back."""
        if verdict.message:
            self._reporter.say(verdict.message)
        if verdict.action == "rollback":
            self.wait()
            saved = load_newest(self._directory, self._reporter.say)
            assert saved is not None, "one is saved before the first step"
            self._run.restore(*saved)
            wait_for_all(self._run.processes)  # the next save may remove the file, so all must have read it

    @contextlib.contextmanager
    def saved_when_data_is_lost(self) -> Iterator[None]:
        """Saves the run as it was after the last finished step when a `ShardError` ends the training: a shard was cut,
        replaced or damaged while it was read.

        Each process that gets the error does what it can alone, and waits for no other.
        """
        try:
            yield
        except ShardError:
            self._run.guard.undo()  # earlier batches of the unfinished step have moved the batch-norm statistics
            with contextlib.suppress(NonFinite):
                self._run.guard.verdict(all_steps=True)
            self.save()
            step = self._run.cursor.step
            self._reporter.say(f"the data failed after step {step}, which is saved; --resume continues there")
            raise
