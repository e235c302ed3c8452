"""Training, from top to bottom: `train --pipeline P --config C --data SHARDS --out RUN [--set a.b=c] [--resume]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from pipelines.contract import PIPELINES
from pipelines.errors import UserError, run_command
from pipelines.lasting_output import lasting_output
from sdpnet.changes import changed_images, changed_keys, require_same_classes
from sdpnet.checkpoint import (
    Checkpoints,
    latest_checkpoint,
    load_newest,
    require_same_order,
    require_same_step,
    write_atomically,
)
from sdpnet.config import absolute_paths, dump_config, load_config
from sdpnet.distributed import (
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
from sdpnet.evaluate import evaluate, write_per_class
from sdpnet.interrupt import stop_signals
from sdpnet.lost_data import saved_when_data_is_lost
from sdpnet.nonfinite import Verdict
from sdpnet.options import Config
from sdpnet.report import Clock, GpuGauge, Reporter
from sdpnet.resolution import image_size_of
from sdpnet.restart import begun_by_this_launch, note_launch
from sdpnet.run_directory import no_run_in, run_directory
from sdpnet.setup import Run, introduction, prepare
from sdpnet.step_profile import DEFAULT_STEPS, StepProfile
from sdpnet.trackers import open_trackers
from sdpnet.training_step import take_step

__all__ = ["add_arguments", "main", "run", "train"]


def train(config: Config, out: Path, *, resume: bool, processes: Processes) -> int:
    """Trains as `config` says and leaves the run in `out`, which the main process holds (`run_directory`).

    Returns the exit status: 0 when finished, 128 + the signal's number when SIGINT, SIGTERM, SIGUSR1 or SIGHUP stopped
    any of the processes (a checkpoint of the last finished step is written first; `resume` continues from it exactly).
    """
    directory = out / "checkpoints"
    if not resume and latest_checkpoint(directory) is not None:
        raise UserError(f"{out}: holds a run already; pass --resume to continue it, or another --out")
    say = print if processes.is_main else lambda *_: None
    newest = load_newest(directory, say) if resume else None
    run = prepare(config, processes, begins=newest is None, threads=newest[1].get("threads") if newest else None)
    if newest is not None:
        continue_from(run, *newest)
        del newest
    elif resume:
        run.notes.append(f"no checkpoint in {directory} yet: the run begins")
    require_same_step(run.cursor.step, out, processes)
    cursor, options = run.cursor, config.train
    if cursor.epoch >= options.epochs:
        return finished_before(run, out, say)

    with contextlib.ExitStack() as stack:
        trackers = []
        if processes.is_main:
            write_atomically(out / "config.yaml", lambda path: path.write_text(dump_config(config), encoding="utf-8"))
            note_launch(out)
            trackers = open_trackers(config.log, out, resumed_step=cursor.step, config=run.state()["config"])
        reporter = stack.enter_context(
            Reporter(out / "metrics.jsonl", is_main=processes.is_main, resumed_step=cursor.step, trackers=trackers)
        )
        received = stack.enter_context(stop_signals())
        for loader in (run.train_loader, run.val_loader):
            stack.enter_context(contextlib.closing(loader))
        steps = config.log.profile if processes.is_main else (0, 0)
        profile = stack.enter_context(StepProfile(out / "trace.json", steps, processes.device, reporter.say))
        checkpoints = None
        if processes.is_main:
            checkpoints = Checkpoints(
                directory, options.keep_checkpoints, options.keep_best, options.async_checkpoints, reporter.say
            )
            stack.enter_context(contextlib.closing(checkpoints))

        def wish() -> Wish:
            if received:
                return Wish.STOP
            return Wish.SAVE if checkpoints is not None and checkpoints.has_failed else Wish.GO_ON

        def stopped() -> int:
            """The number of the signal that stops the run, the same in all processes, or 0."""
            return most(received[0] if received else 0, processes)

        def save(score: float | None = None) -> None:
            if checkpoints is not None:
                checkpoints.save(cursor.step, run.state(), score)

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
                finished = score_run(run, reporter, stopped, out)
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
            run.save_model(out)
        reporter.say(f"done: {out / 'model.safetensors'}")
        reporter.say(next_commands(out))
    return 0


def continue_from(run: Run, path: Path, state: dict[str, Any]) -> None:
    """Loads what a run saved; the run's notes say what has changed since."""
    data = run.config.data.path
    allow = run.config.train.other_classes == "keep"
    classes = require_same_classes(path, state, run.train_loader.manifest.classes, data, allow=allow)
    spread = require_same_order(path, state, run.order, run.world)
    run.load(path, state)
    run.notes += filter(None, [spread, classes, changed_images(state, run.data, data)])
    run.notes += changed_keys(state, asdict(run.config), Path.cwd())
    run.notes.append(f"resumed from {path} (epoch {run.cursor.epoch + 1}, step {run.cursor.step})")


def finished_before(run: Run, out: Path, say: Callable[..., None]) -> int:
    """Says that a resumed run has nothing left to do; writes its model where that is missing."""
    epochs, wanted = run.cursor.epoch, run.config.train.epochs
    say(f"{out}: the run is finished: epoch {epochs} of {wanted}, {run.cursor.step} steps; nothing is left to do")
    say(f"to train on: {how_to_continue(run, out)} --set train.epochs={epochs + max(1, epochs // 10)}")
    if run.processes.is_main and not (out / "model.safetensors").exists():
        run.save_model(out)
        say(f"done: {out / 'model.safetensors'}")
    say(next_commands(out))
    return 0


def how_to_continue(run: Run, out: Path) -> str:
    """The command to type; torchrun's own options are not known here."""
    return resume_command(out) if run.processes.world_size == 1 else "the same command with --resume"


def resume_command(out: Path) -> str:
    return f"train --resume --out {shlex.quote(str(out))}"


def next_commands(out: Path) -> str:
    """What a person may type after a training."""
    run = shlex.quote(str(out))
    return f"next: sdpnet report {run}, or: sdpnet predict --model {run} IMAGE"


def score_run(run: Run, reporter: Reporter, stopped: Callable[[], int], out: Path) -> bool:
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
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any config key, such as optim.lr=1e-3"
    )
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
            with run_directory(arguments.out) if processes.is_main else contextlib.nullcontext():
                resume = arguments.resume or from_main(begun_by_this_launch(arguments.out), processes) == 1
                return train(config, arguments.out, resume=resume, processes=processes)
        finally:
            leave()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
