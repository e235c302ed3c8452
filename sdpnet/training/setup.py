"""Set-up of a run from its config: the loaders, the model, and the training step on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.execution.hardware import amp_dtype
from sdpnet.execution.threads import use_threads
from sdpnet.loading.image_loader import ImageLoader
from sdpnet.model.sdpnet import SdPNet
from sdpnet.optim.learning_rate import peak_learning_rate
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.executors.registry import choose_pipeline
from sdpnet.training.finetune import start_from
from sdpnet.training.run_state import Run
from sdpnet.training.step import make_training_step

__all__ = ["introduction", "prepare"]


def prepare(config: Config, processes: Processes, *, begins: bool = True, threads: int | None = None) -> Run:
    """Opens the shards, creates the model and makes its training step.

    Args:
        begins: whether the run is a new one. The model of a new run gets initial weights from `config.seed` or
            `train.start_from`. A run that continues loads its weights later.
        threads: the number of torch's threads with which a run that continues began, or None.

    Raises:
        UserError: config, data and machine do not fit together.
    """
    device, options = processes.device, config.train
    chosen = [use_threads(processes.shard.local_world_size, threads)] if device.type == "cpu" else []
    dtype = amp_dtype(options.amp, device)

    def loader(split: Literal["train", "val"], num_classes: int | None) -> ImageLoader:
        data, augment = config.data, config.augment
        of_config: dict[str, Any] = {"seed": config.seed, "dtype": dtype, "num_classes": num_classes}
        return ImageLoader.from_options(data, augment, split, processes.shard, device, **of_config)

    train_loader = loader("train", config.model.num_classes)
    num_classes = train_loader.num_classes
    val_loader = loader("val", num_classes)
    _require_classes(config, train_loader, val_loader)
    if num_classes < len(train_loader.manifest.classes):
        raise UserError(
            f"model.num_classes = {num_classes}: the labels of {config.data.path} go to "
            f"{len(train_loader.manifest.classes) - 1}; must be at least {len(train_loader.manifest.classes)}"
        )
    if len(train_loader) < options.accumulate:
        raise UserError(f"train.accumulate = {options.accumulate}: an epoch has only {len(train_loader)} batches")

    peak = peak_learning_rate(config.optim, config.data.batch_size_per_gpu * processes.world_size * options.accumulate)
    if config.optim.min_lr > peak:
        raise UserError(
            f"optim.min_lr = {config.optim.min_lr!r}: must be at most {peak:.3g}, the peak rate for this global "
            "batch (see optim.lr_reference_batch)"
        )

    torch.manual_seed(config.seed)
    model = SdPNet(config.model.options(num_classes))
    notes = [str(choice) for choice in chosen]
    if options.start_from and begins:
        classes = train_loader.manifest.classes
        notes.append(start_from(model, options.start_from, classes, options.other_classes))
    step_of = config, model.to(device), num_classes, processes, train_loader.stage
    training_step, chosen_for_step = make_training_step(*step_of)
    return Run(
        config=config,
        train_loader=train_loader,
        val_loader=val_loader,
        training_step=training_step,
        notes=notes + chosen_for_step,
    )


def _require_classes(config: Config, train: ImageLoader, val: ImageLoader) -> None:
    """Raises `UserError` unless each sample of both splits has one class, of the same classes."""
    sampling = config.data.sampling
    if bool(sampling.labels) != bool(sampling.val_labels):
        given, other = ("labels", "val_labels") if sampling.labels else ("val_labels", "labels")
        raise UserError(f"data.sampling.{given}: the other split has its own labels; give data.sampling.{other}, too")
    for loader, key in ((train, "labels"), (val, "val_labels")):
        if loader.source.labels.ndim == 2:
            raise UserError(
                f"data.sampling.{key}: has rows of numbers, but train needs one class a sample; for several classes or "
                "a regression use sdpnet.ImageLoader in a training loop of your own"
            )
    if len(val.manifest.classes) > len(train.manifest.classes):
        raise UserError(
            f"data.sampling.val_labels: goes to class {len(val.manifest.classes) - 1}, but labels only to "
            f"{len(train.manifest.classes) - 1}"
        )


def introduction(run: Run) -> Iterator[str]:
    """Yields the lines that are printed before the first step."""
    config, processes = run.config, run.processes
    if config.data.pipeline == "auto":
        shards = run.train_loader.manifest.splits[config.data.train_split]
        yield f"pipeline: auto chose {choose_pipeline(processes.device, shards.format)}"
    choices = run.training_step.choices
    dtype = str(choices.dtype).removeprefix("torch.")
    yield (
        f"{config.model.name}: {run.model.num_parameters:,} parameters, {dtype} on "
        f"{processes.world_size} x {processes.device.type}, global batch {run.global_batch_size}, "
        f"{run.steps_per_epoch} steps an epoch, {config.train.epochs} epochs, peak lr {run.peak_learning_rate:.3g}"
    )
    if processes.device.type == "cuda":
        yield f"step on {torch.cuda.get_device_name(processes.device)}: {choices}"
    yield from run.notes
