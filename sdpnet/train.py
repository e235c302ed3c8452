"""Training, from top to bottom: `train --pipeline P --config C --data SHARDS --out RUN [--set a.b=c] [--resume]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from pipelines.contract import PIPELINES, Batch
from pipelines.draws import derive_seed
from pipelines.errors import UserError, run_command
from sdpnet.checkpoint import (
    Checkpoints,
    latest_checkpoint,
    load_newest,
    require_same_order,
    require_same_step,
    save_model,
    write_atomically,
)
from sdpnet.config import dump_config, load_config
from sdpnet.distributed import (
    Arriving,
    Processes,
    StopVote,
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
from sdpnet.micro_batch import out_of_memory, parts
from sdpnet.nonfinite import Verdict
from sdpnet.optim import learning_rate, set_learning_rate
from sdpnet.options import Config
from sdpnet.report import Clock, GpuGauge, Reporter
from sdpnet.resolution import image_size_of
from sdpnet.restart import begun_by_this_launch, note_launch
from sdpnet.run_directory import run_directory
from sdpnet.setup import Run, introduction, prepare
from sdpnet.step_profile import DEFAULT_STEPS, StepProfile
from sdpnet.trackers import open_trackers

__all__ = ["add_arguments", "main", "run", "train"]


def train(config: Config, out: Path, *, resume: bool, processes: Processes) -> int:
    """Trains as `config` says and leaves the run in `out`, which the main process holds (`run_directory`).

    Returns the exit status: 0 when finished, 128 + the signal's number when SIGINT, SIGTERM or SIGUSR1 stopped any of
    the processes (a checkpoint of the last finished step is written first, and `resume` continues from it exactly).
    """
    directory = out / "checkpoints"
    if not resume and latest_checkpoint(directory) is not None:
        raise UserError(f"{out}: holds a run already; pass --resume to continue it, or another --out")
    say = print if processes.is_main else lambda *_: None
    newest = load_newest(directory, say) if resume else None
    run = prepare(config, processes, begins=newest is None, threads=newest[1].get("threads") if newest else None)
    if newest is not None:
        path, state = newest
        spread = require_same_order(path, state, run.order, run.world)
        run.load(path, state)
        run.notes += [spread] if spread else []
        run.notes.append(f"resumed from {path} (epoch {run.cursor.epoch + 1}, step {run.cursor.step})")
        del newest, state
    require_same_step(run.cursor.step, out, processes)
    cursor, options = run.cursor, config.train

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
        gauge, vote = GpuGauge(processes.device), StopVote(processes, late=run.late)
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
                    if vote(bool(received)):
                        break
                    if options.checkpoint_interval and cursor.step % options.checkpoint_interval == 0:
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
                reporter.say(
                    f"stopped after step {cursor.step}; the same command with --resume continues exactly there"
                )
                return 128 + number
        if checkpoints is not None:
            checkpoints.wait()
            save_model(out, run.model, run.card, run.ema.module.state_dict() if run.ema else None)
        reporter.say(f"done: {out / 'model.safetensors'}")
    return 0


def take_step(run: Run, stream: Iterator[Batch], profile: StepProfile) -> tuple[torch.Tensor, torch.Tensor, Verdict]:
    """One optimizer step, over `train.accumulate` batches; the cursor moves on, whether or not the step was taken.

    Returns the loss of this process's samples, the norm of the gradients (before clipping) and the guard's verdict:
    with `run.late` on the step before, and nothing here waits for what the device does.
    """
    config, cursor, processes, accumulate = run.config, run.cursor, run.processes, run.config.train.accumulate
    epochs, steps = config.train.epochs, run.steps_per_epoch
    lr = learning_rate(cursor.step, config.optim, peak=run.peak_learning_rate, steps_per_epoch=steps, epochs=epochs)
    set_learning_rate(run.optimizer, lr)
    # Dropout's draws follow from the cursor too, so nothing of torch's generators need be kept.
    torch.manual_seed(derive_seed(config.seed, cursor.step, processes.shard.rank) >> 1)
    run.optimizer.zero_grad(set_to_none=True)
    run.guard.keep()
    loss = torch.zeros((), device=processes.device)
    too_large = False
    for remaining in reversed(range(accumulate)):
        images, targets = run.take(stream, profile.mark)
        micro_batches = parts(len(images), run.micro_batch)
        for part in micro_batches:
            weight = (part.stop - part.start) / len(images) / accumulate
            wait = remaining or part is not micro_batches[-1]  # for more gradients, before DDP sums them
            try:
                with run.ddp.no_sync() if run.ddp and wait else contextlib.nullcontext():
                    with (
                        profile.mark("forward"),
                        torch.autocast(processes.device.type, run.dtype, enabled=run.dtype != torch.float32),
                    ):
                        part_loss = run.loss(run.network(images[part]), targets[part]) * weight
                    with profile.mark("backward"):
                        run.scaler.scale(part_loss).backward()
            except torch.OutOfMemoryError:
                too_large = True
            if too_large:
                del images, targets
                raise out_of_memory(run.model, run.one_pass, run.micro_batch, batch_size=config.data.batch_size_per_gpu)
            loss += part_loss.detach()
    with profile.mark("optimizer"):
        run.scaler.unscale_(run.optimizer)
        if config.optim.clip_grad_norm > 0:
            grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.optim.clip_grad_norm)
        else:
            gradients = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
        verdict = run.update(loss, grad_norm)
    profile.step()
    cursor.step += 1
    cursor.step_in_epoch += 1
    return loss, grad_norm, verdict


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
        write_per_class(out / "per_class.csv", run.train_loader.manifest.classes, scores.counts)
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
        raise UserError(
            "no config given: pass --config NAME (see configs/), or --resume with the --out of an earlier run"
        )
    config = load_config(arguments.config or str(own), settings)
    with one_line_when_lost(config.train.timeout_seconds):
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
