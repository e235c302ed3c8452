"""The surroundings of the training loop: reporter, checkpoints, signals and profile, opened and closed together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sdpnet.checkpoints.model import write_atomically
from sdpnet.config.load import dump_config
from sdpnet.config.resolution import image_size_of, patch_dropout_of
from sdpnet.distributed.interrupt import stop_signals
from sdpnet.distributed.processes import (
    AsyncRead,
    Vote,
    Wish,
    count_over_processes,
    max_over_processes,
    sum_on_device,
)
from sdpnet.distributed.restart import record_launch
from sdpnet.pipelines.contract import Batch
from sdpnet.reporting.reporter import Clock, GpuGauge, Reporter
from sdpnet.reporting.step_profile import StepProfile
from sdpnet.reporting.trackers import open_trackers
from sdpnet.training.checkpointing import Checkpointing
from sdpnet.training.run_state import Run
from sdpnet.training.setup import introduction

__all__ = ["Session", "open_session"]


@dataclass
class Session:
    """A run that trains in this process, with the operations that the training loop needs between two steps."""

    run: Run
    reporter: Reporter
    checkpointing: Checkpointing
    profile: StepProfile
    signals: list[int]  # the numbers of the signals received so far
    vote: Vote
    gauge: GpuGauge
    clock: Clock

    def stop_signal(self) -> int:
        """The number of the signal that stops the run, or 0; the same in all processes."""
        return max_over_processes(self.signals[0] if self.signals else 0, self.run.processes)

    def decide(self) -> Wish:
        """The decision of all processes after a step: to go on, to save or to stop."""
        if self.signals:
            return self.vote(Wish.STOP)
        return self.vote(Wish.SAVE if self.checkpointing.has_failed else Wish.GO_ON)

    @contextlib.contextmanager
    def epoch(self) -> Iterator[Iterator[Batch]]:
        """The batches of the epoch that the cursor is in, from its next step on."""
        run, cursor = self.run, self.run.cursor
        image_size = image_size_of(cursor.epoch, run.config.resolution, run.config.data.image_size)
        with run.training_step.side():
            run.train_loader.set_image_size(image_size)
        run.model.patch_dropout = patch_dropout_of(cursor.epoch, run.config)
        run.training_step.network.train()
        self.reporter.begin_epoch(cursor.epoch, cursor.step_in_epoch, run.steps_per_epoch)
        batches = run.train_loader.batches(cursor.epoch, cursor.step_in_epoch * run.config.train.accumulate)
        run.training_step.data_wait.restart()
        self.clock = Clock(run.training_step.data_wait.read)
        with contextlib.closing(batches):
            yield self.clock.timed(batches)

    def report_step(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Counts a step, and after each log interval reports it."""
        run, cursor = self.run, self.run.cursor
        self.reporter.advance()
        self.clock.stepped(run.global_batch_size)
        if cursor.step % run.config.train.log_interval:
            return
        mean_loss = sum_on_device(loss.clone(), run.processes) / run.processes.world_size
        self.reporter.training(
            {
                "epoch": cursor.epoch,
                "step": cursor.step,
                "train_loss": AsyncRead(mean_loss),
                "lr": max(group["lr"] for group in run.optimizer.param_groups),
                "grad_norm": AsyncRead(grad_norm),
                **self.clock.read(),
                **self.gauge.read(),
            }
        )

    def report_masked(self) -> None:
        """Reports the training images of the epoch that could not be decoded, if there were any."""
        masked = count_over_processes(len(self.run.train_loader.masked), self.run.processes)
        self.reporter.masked(self.run.cursor.epoch, self.run.config.data.train_split, masked)


@contextlib.contextmanager
def open_session(
    run: Run, out: Path, score: float | None, require_own: Callable[[], object] = lambda: None
) -> Iterator[Session]:
    """Opens all parts of a session and prints its introduction. If the data is lost meanwhile, the run is saved.

    Args:
        out: the run's directory, which gets `config.yaml`, `metrics.jsonl`, `checkpoints/` and a trace.
        score: that of the newest checkpoint of a run that continues, or None.
        require_own: raises when another process has taken over `out`.
    """
    processes, cursor = run.processes, run.cursor
    with contextlib.ExitStack() as stack:
        trackers = []
        if processes.is_main:
            text = dump_config(run.config)
            write_atomically(out / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
            record_launch(out)
            trackers = open_trackers(run.config.log, out, resumed_step=cursor.step, config=run.state()["config"])
        reporter = stack.enter_context(
            Reporter(
                out / "metrics.jsonl",
                is_main=processes.is_main,
                resumed_step=cursor.step,
                evaluated=cursor.step_in_epoch == 0,  # else it was saved before the evaluation of the epoch
                trackers=trackers,
                require_own=require_own,
            )
        )
        signals = stack.enter_context(stop_signals())
        for loader in (run.train_loader, run.val_loader):
            stack.enter_context(contextlib.closing(loader))
        steps = run.config.log.profile if processes.is_main else (0, 0)
        profile = stack.enter_context(StepProfile(out / "trace.json", steps, processes.device, reporter.say))
        checkpointing = stack.enter_context(
            contextlib.closing(Checkpointing(run, out / "checkpoints", reporter, score, require_own))
        )
        for line in introduction(run):
            reporter.say(line)
        if run.config.train.on_nonfinite == "rollback" and cursor.step == 0:
            checkpointing.save()
        stack.enter_context(checkpointing.saved_when_data_is_lost())
        vote = Vote(processes, asynchronous=run.training_step.choices.asynchronous)
        yield Session(run, reporter, checkpointing, profile, signals, vote, GpuGauge(processes.device), Clock())
