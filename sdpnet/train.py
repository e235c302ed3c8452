"""Training, from top to bottom: `train --pipeline P --config C --data SHARDS --out RUN [--set a.b=c] [--resume]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from sdpnet.flags.train import add_arguments
from sdpnet.pipelines.terminal.command_line import parse, run_alone

if __name__ == "__main__":  # --help and mistyped flags end here, before torch is imported
    parse("train", __doc__, add_arguments)

from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes, Wish
from sdpnet.training.continued_run import begin_or_continue, finished_before, how_to_continue, next_commands
from sdpnet.training.launch import config_from, launched
from sdpnet.training.run_state import take_step
from sdpnet.training.scoring import score_run
from sdpnet.training.session import open_session

__all__ = ["add_arguments", "main", "run", "train"]


def train(
    config: Config,
    out: Path,
    *,
    resume: bool,
    processes: Processes,
    require_own: Callable[[], object] = lambda: None,
) -> int:
    """Trains as `config` says and writes the run to `out`.

    Args:
        out: the run's directory, which the main process holds; `require_own` is that of its `RunDirectory`.
        resume: continue the newest checkpoint in `out`, if there is one.

    Returns:
        The exit status: 0 when the training is finished; 128 + the signal's number when SIGINT, SIGTERM, SIGUSR1 or
        SIGHUP stopped any of the processes. Before that a checkpoint of the last finished step is written, from which
        `resume` continues exactly.
    """
    run, score = begin_or_continue(config, out, resume=resume, processes=processes)
    cursor, options = run.cursor, config.train
    if cursor.epoch >= options.epochs:
        return finished_before(run, out, score, require_own)
    with open_session(run, out, score, require_own) as session:
        reporter, checkpointing = session.reporter, session.checkpointing
        while cursor.epoch < options.epochs:
            with session.epoch() as batches:
                while cursor.step_in_epoch < run.steps_per_epoch:
                    loss, grad_norm, verdict = take_step(run, batches, session.profile)
                    checkpointing.apply(verdict)
                    session.report_step(loss, grad_norm)
                    decision = session.decide()
                    if decision is Wish.STOP:
                        break
                    due = options.checkpoint_interval > 0 and cursor.step % options.checkpoint_interval == 0
                    if due or decision is Wish.SAVE:
                        checkpointing.apply(run.guard.verdict(all_steps=True))
                        checkpointing.save()
            checkpointing.apply(run.guard.verdict(all_steps=True))
            session.report_masked()

            finished, score = cursor.step_in_epoch == run.steps_per_epoch and not session.stop_signal(), None
            is_last = cursor.epoch + 1 == options.epochs
            if finished and (is_last or (cursor.epoch + 1) % options.eval_interval == 0):
                score = score_run(run, reporter, session.stop_signal, out, require_own)
                finished = score is not None
            if finished:
                cursor.epoch, cursor.step_in_epoch = cursor.epoch + 1, 0
            checkpointing.save(score)

            if number := session.stop_signal():
                checkpointing.wait()  # torchrun ends all processes as soon as the first one ends
                reporter.say(f"stopped after step {cursor.step}; {how_to_continue(run, out)} continues exactly there")
                return 128 + number
        checkpointing.save_model(out)
        reporter.say(f"done: {out / 'model.safetensors'}")
        for line in next_commands(out):
            reporter.say(line)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Runs the command with the arguments of `add_arguments`; returns the exit status."""
    config = config_from(arguments)
    with launched(config, arguments.out, resume=arguments.resume) as launch:
        return train(
            config,
            arguments.out,
            resume=launch.resume,
            processes=launch.processes,
            require_own=launch.require_own,
        )


def main(argv: list[str] | None = None, program: str = "train") -> int:
    """The command line; returns the exit status."""
    return run_alone(program, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
