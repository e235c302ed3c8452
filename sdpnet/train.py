"""Training, from top to bottom: `train --pipeline P --config C --data SHARDS --out RUN [--set a.b=c] [--resume]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn

from sdpnet.checkpoints.model import Checkpoints, latest_checkpoint, load_newest, require_same_step, write_atomically
from sdpnet.config.load import PATH_KEYS, absolute_paths, dump_config, flat_values, load_config
from sdpnet.config.options import Config
from sdpnet.config.setting import add_settings
from sdpnet.distributed.interrupt import stop_signals
from sdpnet.distributed.processes import (
    Arriving,
    Processes,
    Vote,
    Wish,
    from_main,
    join,
    leave,
    most,
    one_line_when_lost,
    same_weights,
    sum_on_device,
    total,
)
from sdpnet.distributed.restart import begun_by_this_launch, note_launch
from sdpnet.distributed.run_directory import no_run_in, run_directory
from sdpnet.optim.nonfinite import Verdict
from sdpnet.pipelines.contract import PIPELINES
from sdpnet.pipelines.errors import UserError, printable, run_command
from sdpnet.pipelines.lasting_output import lasting_output
from sdpnet.pipelines.terminal.command_line import CommandParser
from sdpnet.reporting.reporter import Clock, GpuGauge, Reporter
from sdpnet.reporting.step_profile import DEFAULT_STEPS, StepProfile
from sdpnet.reporting.trackers import open_trackers
from sdpnet.training.continued_run import continue_from, finished_before, how_to_continue, next_commands, resume_command
from sdpnet.training.evaluate import evaluate, write_per_class
from sdpnet.training.lost_data import saved_when_data_is_lost
from sdpnet.training.resolution import image_size_of
from sdpnet.training.same_start import code_facts, require_same_start, shard_facts
from sdpnet.training.setup import Run, introduction, prepare
from sdpnet.training.step import take_step

__all__ = ["add_arguments", "main", "run", "train"]


def train(
    config: Config,
    out: Path,
    *,
    resume: bool,
    processes: Processes,
    require_own: Callable[[], object] = lambda: None,
) -> int:
    """Trains as `config` says and leaves the run in `out`, which the main process holds: `require_own` is that of its
    `RunDirectory`.

    Returns the exit status: 0 when finished, 128 + the signal's number when SIGINT, SIGTERM, SIGUSR1 or SIGHUP stopped
    any of the processes (a checkpoint of the last finished step is written first; `resume` continues from it exactly).
    """
    directory = out / "checkpoints"
    if not resume and latest_checkpoint(directory) is not None:
        raise UserError(f"{out}: holds a run already; pass --resume to continue it, or another --out")

    def say_early(text: str) -> None:
        if processes.is_main:
            print(printable(text))

    newest = load_newest(directory, say_early) if resume else None
    last_score = newest[1].get("score") if newest else None
    run = prepare(config, processes, begins=newest is None, threads=newest[1].get("threads") if newest else None)
    if newest is not None:
        continue_from(run, *newest)
        del newest
    elif resume:
        run.notes.append(f"no checkpoint in {directory} yet: the run begins")
    require_same_step(run.cursor.step, out, processes)
    cursor, options = run.cursor, config.train
    if cursor.epoch >= options.epochs:
        return finished_before(run, out, last_score, say_early, require_own)

    with contextlib.ExitStack() as stack:
        trackers = []
        if processes.is_main:
            write_atomically(out / "config.yaml", lambda path: path.write_text(dump_config(config), encoding="utf-8"))
            note_launch(out)
            trackers = open_trackers(config.log, out, resumed_step=cursor.step, config=run.state()["config"])
        reporter = stack.enter_context(
            Reporter(
                out / "metrics.jsonl",
                is_main=processes.is_main,
                resumed_step=cursor.step,
                evaluated=cursor.step_in_epoch == 0,  # else the checkpoint was saved before the epoch's evaluation
                trackers=trackers,
                require_own=require_own,
            )
        )
        received = stack.enter_context(stop_signals())
        for loader in (run.train_loader, run.val_loader):
            stack.enter_context(contextlib.closing(loader))
        steps = config.log.profile if processes.is_main else (0, 0)
        profile = stack.enter_context(StepProfile(out / "trace.json", steps, processes.device, reporter.say))
        checkpoints = None
        if processes.is_main:
            keep = options.keep_checkpoints, options.keep_best
            checkpoints = Checkpoints(directory, *keep, options.async_checkpoints, reporter.say, require_own)
            stack.enter_context(contextlib.closing(checkpoints))
            if cursor.step:
                checkpoints.finish(cursor.step, last_score)

        def wish() -> Wish:
            if received:
                return Wish.STOP
            return Wish.SAVE if checkpoints is not None and checkpoints.has_failed else Wish.GO_ON

        def stopped() -> int:
            """The number of the signal that stops the run, the same in all processes, or 0."""
            return most(received[0] if received else 0, processes)

        def save(score: float | None = None) -> None:
            if checkpoints is not None:
                reporter.settle()
                checkpoints.save(cursor.step, {**run.state(), "score": score}, score)

        def wait_for_save() -> None:
            if checkpoints is not None:
                checkpoints.wait()
            total(0, processes)  # the others wait for it

        def roll_back() -> None:
            wait_for_save()
            saved = load_newest(directory, reporter.say)
            assert saved is not None, "one is saved before the first step"
            run.restore(*saved)
            total(0, processes)  # all have read it: a save may remove it

        def heed(verdict: Verdict) -> None:
            if verdict.message:
                reporter.say(verdict.message)
            if verdict.action == "rollback":
                roll_back()

        for line in introduction(run):
            reporter.say(line)
        if options.on_nonfinite == "rollback" and cursor.step == 0:
            save()
        stack.enter_context(saved_when_data_is_lost(run, save, reporter.say))
        gauge, vote = GpuGauge(processes.device), Vote(processes, late=run.late)
        while cursor.epoch < options.epochs:
            image_size = image_size_of(cursor.epoch, config.resolution, config.data.image_size)
            with run.side():
                run.train_loader.set_image_size(image_size)
            run.network.train()
            reporter.begin_epoch(cursor.epoch, cursor.step_in_epoch, run.steps_per_epoch)
            batches = run.train_loader.batches(cursor.epoch, cursor.step_in_epoch * options.accumulate)
            clock = Clock()
            with contextlib.closing(batches):
                stream = clock.timed(batches)
                while cursor.step_in_epoch < run.steps_per_epoch:
                    loss, grad_norm, verdict = take_step(run, stream, profile)
                    heed(verdict)
                    reporter.advance()
                    clock.stepped(run.global_batch_size)
                    if cursor.step % options.log_interval == 0:
                        lr = max(group["lr"] for group in run.optimizer.param_groups)
                        mean_loss = sum_on_device(loss.clone(), processes) / processes.world_size
                        metrics = {"train_loss": Arriving(mean_loss), "lr": lr, "grad_norm": Arriving(grad_norm)}
                        position = {"epoch": cursor.epoch, "step": cursor.step}
                        reporter.training({**position, **metrics, **clock.read(), **gauge.read()})
                    granted = vote(wish())
                    if granted is Wish.STOP:
                        break
                    due = options.checkpoint_interval > 0 and cursor.step % options.checkpoint_interval == 0
                    if due or granted is Wish.SAVE:
                        heed(run.guard.told(all_steps=True))
                        save()
            heed(run.guard.told(all_steps=True))
            reporter.masked(cursor.epoch, config.data.train_split, total(len(run.train_loader.masked), processes))
            finished, score = cursor.step_in_epoch == run.steps_per_epoch and not stopped(), None
            last = cursor.epoch + 1 == options.epochs
            if finished and (last or (cursor.epoch + 1) % options.eval_interval == 0):
                finished = score_run(run, reporter, stopped, out, require_own)
                score = run.evaluation.get("ema_top1", run.evaluation.get("top1")) if finished else None
            if finished:
                cursor.epoch, cursor.step_in_epoch = cursor.epoch + 1, 0
            save(score)
            if number := stopped():
                wait_for_save()  # torchrun ends all processes when the first one ends
                reporter.say(f"stopped after step {cursor.step}; {how_to_continue(run, out)} continues exactly there")
                return 128 + number
        if checkpoints is not None:
            checkpoints.wait()
            require_own()
            run.save_model(out)
        reporter.say(f"done: {out / 'model.safetensors'}")
        reporter.say(next_commands(out))
    return 0


def score_run(
    run: Run, reporter: Reporter, stopped: Callable[[], int], out: Path, require_own: Callable[[], object]
) -> bool:
    """Evaluates the model, and its average; False when a signal came meanwhile, and nothing is told of it then."""
    models: list[tuple[str, nn.Module]] = [("", run.model)] + ([("ema_", run.ema.module)] if run.ema else [])
    evaluation: dict[str, float] = {}
    for prefix, model in models:
        same_weights(model, run.processes)
        result = evaluate(model, run.val_loader, run.val_stage, run.processes, stopped)
        if result is None:
            return False
        scores, evaluation = result, {**evaluation, **result.as_dict(prefix)}
    masked = total(len(run.val_loader.masked), run.processes)
    reporter.masked(run.cursor.epoch, run.config.data.val_split, masked)
    run.evaluation = evaluation
    if run.processes.is_main:
        try:
            require_own()
            write_per_class(out / "per_class.csv", run.train_loader.manifest.classes, scores.counts)
        except OSError as error:  # a full disk; the scores are said all the same
            reporter.say(f"{out / 'per_class.csv'}: cannot be written ({error.strerror})")
    reporter.evaluation({"epoch": run.cursor.epoch, "step": run.cursor.step, **evaluation}, scores.num_samples)
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", help="a name from configs/ or the path of a .yaml file; --resume alone takes the run's own"
    )
    parser.add_argument("--data", help="shard set made by preprocess/build_ffcv.py (config key data.path)")
    parser.add_argument("--out", required=True, type=Path, help="directory of the run")
    parser.add_argument("--pipeline", choices=["auto", *PIPELINES], help="config key data.pipeline")
    add_settings(parser)
    parser.add_argument("--resume", action="store_true", help="continue the newest checkpoint in --out")
    first, count = DEFAULT_STEPS
    traced = f"write a trace of {count} steps to OUT/trace.json (config key log.profile = [{first}, {count}])"
    parser.add_argument("--profile", action="store_true", help=traced)


def run(arguments: argparse.Namespace) -> int:
    settings = list(arguments.set)
    settings += [f"data.path={json.dumps(arguments.data)}"] if arguments.data else []
    settings += [f"data.pipeline={arguments.pipeline}"] if arguments.pipeline else []
    settings += [f"log.profile={list(DEFAULT_STEPS)}"] if arguments.profile else []
    own = arguments.out / "config.yaml"
    if not arguments.config and not (arguments.resume and own.is_file()):
        if arguments.resume:
            raise UserError(no_run_in(arguments.out))
        there = f", or continue the run that is there: {resume_command(arguments.out)}" if own.is_file() else ""
        raise UserError(f"no config given: pass --config NAME (see configs/){there}")
    config = absolute_paths(load_config(arguments.config or str(own), settings))
    with (
        lasting_output(f"training goes on; {arguments.out / 'metrics.jsonl'} has its figures"),
        one_line_when_lost(config.train.timeout_seconds),
    ):
        processes = join(config.train.device, config.train.timeout_seconds)
        try:
            with run_directory(arguments.out) if processes.is_main else contextlib.nullcontext() as held:
                own = held.require_own if held else lambda: None
                require_same_start(lambda: _facts(config), processes)
                resume = arguments.resume or from_main(begun_by_this_launch(arguments.out), processes) == 1
                return train(config, arguments.out, resume=resume, processes=processes, require_own=own)
        finally:
            leave()


def _facts(config: Config) -> dict[str, str]:
    """What all processes must have alike; paths may differ from machine to machine."""
    values = {key: str(value) for key, value in flat_values(asdict(config)) if key not in PATH_KEYS}
    data = config.data
    shards = shard_facts(data.path, (data.train_split, data.val_split)) if data.path else {}
    return {**values, **code_facts(), **shards}


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(prog="train", description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
