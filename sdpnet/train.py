"""Training, from top to bottom: `train --pipeline P --config C --data SHARDS --out RUN [--set a.b=c] [--resume]`."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines.augment import DeviceStage
from pipelines.contract import PIPELINES, choose_pipeline, make_loader
from pipelines.draws import derive_seed
from pipelines.errors import UserError, run_command
from sdpnet.checkpoint import (
    ModelCard,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_model,
    write_atomically,
)
from sdpnet.config import dump_config, load_config
from sdpnet.distributed import Processes, amp_dtype, any_process, join, leave, same_weights, total
from sdpnet.evaluate import evaluate
from sdpnet.interrupt import stop_signals
from sdpnet.loss import soft_cross_entropy
from sdpnet.model import SdPNet
from sdpnet.optim import learning_rate, make_optimizer, peak_learning_rate
from sdpnet.options import Config
from sdpnet.report import Clock, Reporter

__all__ = ["add_arguments", "main", "run", "train"]


@dataclass
class Cursor:
    """Where training stands: the next step of which epoch, and optimizer steps taken in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


def train(config: Config, out: Path, *, resume: bool, processes: Processes) -> int:
    """Trains as `config` says and leaves the run in `out`.

    Returns the exit status: 0 when finished, 128 + the signal's number when stopped by SIGINT or SIGTERM (a checkpoint
    of the last finished step is written first, and `resume` continues from it exactly).
    """
    device, world_size = processes.device, processes.world_size
    checkpoints = out / "checkpoints"
    newest = latest_checkpoint(checkpoints)
    if newest is not None and not resume:
        raise UserError(f"{out}: holds a run already; pass --resume to continue it, or another --out")
    train_loader = make_loader(config, "train", processes.shard, device)
    val_loader = make_loader(config, "val", processes.shard, device)
    classes = train_loader.manifest.classes
    num_classes = config.model.num_classes or len(classes)
    if num_classes < len(classes):
        raise UserError(
            f"model.num_classes = {num_classes}: the labels of {config.data.path} go to {len(classes) - 1}; "
            f"must be at least {len(classes)}"
        )

    accumulate, options = config.train.accumulate, config.optim
    steps_per_epoch = len(train_loader) // accumulate
    if steps_per_epoch == 0:
        raise UserError(f"train.accumulate = {accumulate}: an epoch has only {len(train_loader)} batches")
    global_batch_size = config.data.batch_size_per_gpu * world_size * accumulate
    peak = peak_learning_rate(options, global_batch_size)

    dtype = amp_dtype(config.train.amp, device)
    torch.manual_seed(config.seed)
    model = SdPNet(config.model.options(num_classes)).to(device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, options)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    # What the order of samples depends on: a checkpoint continues only where all of it is the same.
    order = {
        "seed": config.seed,
        "global_batch_size": global_batch_size,
        "num_samples": train_loader.source.plan.num_samples,
    }
    cursor = Cursor()
    evaluation: dict[str, float] = {}  # of the last epoch that was scored
    if newest is not None:
        state = load_checkpoint(newest)
        load_weights(model, state["model"], newest)
        for name, value in order.items():
            was = state["order"].get(name)
            if was != value:
                raise UserError(f"{newest}: was trained with {name} {was}, not {value}: it cannot be continued exactly")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        cursor = Cursor(**state["cursor"])
        evaluation = state["evaluation"]
    stage = DeviceStage(config.augment, num_classes, dtype, train=True)
    val_stage = DeviceStage(config.augment, num_classes, dtype, train=False)
    ddp = DistributedDataParallel(model) if world_size > 1 else None
    network = ddp or model

    def save() -> None:
        if processes.is_main:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "cursor": asdict(cursor),
                "order": order,
                "evaluation": evaluation,
            }
            save_checkpoint(checkpoints, cursor.step, state, config.train.keep_checkpoints)

    if processes.is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.yaml", lambda path: path.write_text(dump_config(config), encoding="utf-8"))
    reporter = Reporter(out / "metrics.jsonl", is_main=processes.is_main, resumed_step=cursor.step)
    with reporter, stop_signals() as received, contextlib.closing(train_loader), contextlib.closing(val_loader):

        def stopped() -> bool:
            return any_process(bool(received), processes)

        if config.data.pipeline == "auto":
            shards = train_loader.manifest.splits[config.data.train_split]
            reporter.say(f"pipeline: auto chose {choose_pipeline(device, shards.format)}")
        reporter.say(
            f"{config.model.name}: {model.num_parameters:,} parameters, {str(dtype).removeprefix('torch.')} on "
            f"{world_size} x {device.type}, global batch {global_batch_size}, {steps_per_epoch} steps an epoch, "
            f"{config.train.epochs} epochs, peak lr {peak:.3g}"
        )
        if newest is not None:
            reporter.say(f"resumed from {newest} (epoch {cursor.epoch + 1}, step {cursor.step})")
        while cursor.epoch < config.train.epochs:
            network.train()
            reporter.begin_epoch(cursor.epoch, cursor.step_in_epoch, steps_per_epoch)
            batches = train_loader.batches(cursor.epoch, cursor.step_in_epoch * accumulate)
            clock = Clock()
            with contextlib.closing(batches):
                stream = clock.timed(batches)
                while cursor.step_in_epoch < steps_per_epoch:
                    lr = learning_rate(
                        cursor.step, options, peak=peak, steps_per_epoch=steps_per_epoch, epochs=config.train.epochs
                    )
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    # Dropout's draws follow from the cursor too, so nothing of torch's generators need be kept.
                    torch.manual_seed(derive_seed(config.seed, cursor.step, processes.shard.rank) >> 1)
                    optimizer.zero_grad(set_to_none=True)
                    loss = torch.zeros((), device=device)
                    for micro in range(accumulate):
                        images, targets = stage(next(stream))
                        with ddp.no_sync() if ddp and micro + 1 < accumulate else contextlib.nullcontext():
                            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                                logits = network(images)
                            micro_loss = soft_cross_entropy(logits, targets) / accumulate
                            scaler.scale(micro_loss).backward()
                        loss += micro_loss.detach()
                    scaler.unscale_(optimizer)
                    cursor.step += 1
                    cursor.step_in_epoch += 1
                    logging = cursor.step % config.train.log_interval == 0
                    if options.clip_grad_norm > 0:
                        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad_norm)
                    elif logging:
                        gradients = [p.grad for p in model.parameters() if p.grad is not None]
                        grad_norm = torch.nn.utils.get_total_norm(gradients)
                    scaler.step(optimizer)
                    scaler.update()

                    reporter.advance()
                    clock.images += global_batch_size
                    if logging:
                        metrics = {"train_loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
                        reporter.training({"epoch": cursor.epoch, "step": cursor.step, **metrics, **clock.read()})
                    if stopped():
                        break
                    if config.train.checkpoint_interval and cursor.step % config.train.checkpoint_interval == 0:
                        save()
            reporter.masked(cursor.epoch, config.data.train_split, total(len(train_loader.masked), processes))
            finished = cursor.step_in_epoch == steps_per_epoch and not stopped()
            last = cursor.epoch + 1 == config.train.epochs
            if finished and (last or (cursor.epoch + 1) % config.train.eval_interval == 0):
                same_weights(model, processes)
                scores = evaluate(model, val_loader, val_stage, processes, stopped)
                reporter.masked(cursor.epoch, config.data.val_split, total(len(val_loader.masked), processes))
                if scores is None:
                    finished = False
                else:
                    evaluation = scores.as_dict()
                    position = {"epoch": cursor.epoch, "step": cursor.step}
                    reporter.evaluation({**position, **evaluation}, scores.num_samples)
            if finished:
                cursor.epoch, cursor.step_in_epoch = cursor.epoch + 1, 0
            save()
            if stopped() or not finished:
                reporter.say(
                    f"stopped after step {cursor.step}; the same command with --resume continues exactly there"
                )
                return 128 + (received[0] if received else signal.SIGTERM)
        if processes.is_main:
            data, augment = config.data, config.augment
            card = ModelCard(
                model.options, classes, data.image_size, data.centre_fraction, augment.mean, augment.std, evaluation
            )
            save_model(out, model, card)
        reporter.say(f"done: {out / 'model.safetensors'}")
    return 0


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


def run(arguments: argparse.Namespace) -> int:
    settings = list(arguments.set)
    settings += [f"data.path={arguments.data}"] if arguments.data else []
    settings += [f"data.pipeline={arguments.pipeline}"] if arguments.pipeline else []
    own = arguments.out / "config.yaml"
    if not arguments.config and not (arguments.resume and own.is_file()):
        raise UserError(
            "no config given: pass --config NAME (see configs/), or --resume with the --out of an earlier run"
        )
    config = load_config(arguments.config or str(own), settings)
    processes = join(config.train.device)
    try:
        return train(config, arguments.out, resume=arguments.resume, processes=processes)
    finally:
        leave()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
