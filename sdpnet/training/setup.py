"""Puts a run together from its config: the loaders, the model and all that trains it, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sdpnet.checkpoints.model import ModelCard, load_optimizer, load_weights, save_model
from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.depthwise_choice import choose_depthwise
from sdpnet.execution.hardware import StepChoices, choose_step, look_at
from sdpnet.execution.memory_format import choose_memory_format
from sdpnet.execution.micro_batch import choose_micro_batch, training_pass
from sdpnet.execution.side_stream import SideStream
from sdpnet.execution.sync_norm import synchronize_batch_norm
from sdpnet.execution.threads import use_threads
from sdpnet.model.sdpnet import SdPNet
from sdpnet.optim.ema import ModelEma
from sdpnet.optim.loss import make_loss
from sdpnet.optim.nonfinite import Guard, Verdict
from sdpnet.optim.optimizer import make_optimizer, peak_learning_rate
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch, Loader
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.executors.registry import choose_pipeline
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.loader import make_loader
from sdpnet.training.finetune import start_from
from sdpnet.training.update import update

__all__ = ["Cursor", "Run", "introduction", "prepare"]

_PROBED_IMAGES = 64  # at most, of the memory format's probe: they fit where one pass of training does


@dataclass
class Cursor:
    """Where training stands: the next step of which epoch, and optimizer steps taken in all."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


@dataclass
class Run:
    """One training run. What changes while it trains is in `model`, `ema`, `optimizer`, `scaler`, `guard`, `cursor` and
    `evaluation` (the scores of the last epoch that was scored); `ddp` wraps the model in several processes; training's
    batches are made ready at `side`. `choices` say how a step is taken; `one_pass` runs forward and backward over so
    many blank images, or is None in several processes, where DDP would take its gradients for a step's; `notes` are
    lines for the user.
    """

    config: Config
    processes: Processes
    train_loader: Loader
    val_loader: Loader
    stage: DeviceStage
    val_stage: DeviceStage
    side: SideStream
    model: SdPNet
    ddp: DistributedDataParallel | None
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    one_pass: Callable[[int], None] | None
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    choices: StepChoices
    memory_format: torch.memory_format
    micro_batch: int
    notes: list[str]
    cursor: Cursor = field(default_factory=Cursor)
    evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.choices.dtype

    @property
    def late(self) -> bool:
        """Whether the host never waits for the device within a step."""
        return self.choices.late

    @property
    def network(self) -> nn.Module:
        """What training calls: the model, under DDP in several processes."""
        return self.ddp or self.model

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader) // self.config.train.accumulate

    @property
    def global_batch_size(self) -> int:
        return self.config.data.batch_size_per_gpu * self.processes.world_size * self.config.train.accumulate

    @property
    def peak_learning_rate(self) -> float:
        return peak_learning_rate(self.config.optim, self.global_batch_size)

    @property
    def order(self) -> dict[str, int | str]:
        """What the order of samples depends on: a run continues only where all of it is the same."""
        num_samples = self.train_loader.source.plan.num_samples
        sizes = {"global_batch_size": self.global_batch_size, "num_samples": num_samples}
        return {"seed": self.config.seed, **sizes, "data.order": self.config.data.order}

    @property
    def data(self) -> dict[str, str]:
        """Which images the run trains on and is scored by: the fingerprints of the two splits."""
        options, splits = self.config.data, self.train_loader.manifest.splits
        return {name: splits[name].fingerprint for name in (options.train_split, options.val_split)}

    @property
    def world(self) -> dict[str, int]:
        """How a global batch is spread, which may change when a run continues."""
        return {
            "world_size": self.processes.world_size,
            "batch_size_per_gpu": self.config.data.batch_size_per_gpu,
            "accumulate": self.config.train.accumulate,
        }

    @property
    def card(self) -> ModelCard:
        data, augment = self.config.data, self.config.augment
        return ModelCard(
            self.model.options,
            self.train_loader.manifest.classes,
            data.image_size,
            data.centre_fraction,
            augment.mean,
            augment.std,
            self.evaluation,
            preprocessing=Preprocessing.of(self.train_loader.manifest.encode),
        )

    def take(
        self, batches: Iterator[Batch], mark: Callable[[str], AbstractContextManager[object]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next training batch's images and targets for the model, made ready beside the step before. `mark` frames
        the waiting ("data wait") and the device stage ("augment")."""
        with mark("data wait"), self.side():
            batch = next(batches)
        with mark("augment"), self.side():
            images, targets = self.stage(batch)
            images = images.to(memory_format=self.memory_format)
        self.side.join(images, targets)
        return images, targets

    def update(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> Verdict:
        """Ends the step that the cursor is at, after its backward pass: see `sdpnet.training.update`."""
        return update(
            self.cursor.step + 1,
            loss,
            grad_norm,
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            guard=self.guard,
            ema=self.ema,
            late=self.late,
        )

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds. Nothing of torch's generators: their draws follow from the cursor."""
        return {
            "version": 2,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "ema_updates": self.ema.num_updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "cursor": asdict(self.cursor),
            "order": self.order,
            "world": self.world,
            "data": self.data,
            "evaluation": self.evaluation,
            "card": asdict(self.card),
            "config": asdict(self.config),
            "threads": torch.get_num_threads(),  # a CPU's sums depend on it in their last bits
        }

    def save_model(self, directory: Path) -> bool:
        """Writes the finished model, with the averaged weights where there are any; False when it is there already."""
        return save_model(directory, self.model, self.card, self.ema.module.state_dict() if self.ema else None)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Continues from what `state` wrote. Raises `UserError` when it is another model's."""
        self.restore(path, state)
        cursor = Cursor(**state["cursor"])
        if cursor.step_in_epoch > self.steps_per_epoch:
            steps = f"step {cursor.step_in_epoch} of an epoch of {self.steps_per_epoch}"
            raise UserError(f"{path}: stands at {steps}: is not of this run; begin anew in another --out")
        self.guard.load_state_dict({"bad_steps": [], **state.get("guard", {})})
        self.cursor = cursor
        self.evaluation = state["evaluation"]

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Weights, averages, optimizer and scaler as they were, but not the place in the order of samples."""
        averaged = state.get("ema")
        if (averaged is None) != (self.ema is None):
            has = "no" if averaged is None else "an"
            raise UserError(f"{path}: has {has} average of the weights; set ema.decay as that run had it")
        load_weights(self.model, state["model"], path)
        if self.ema is not None and averaged is not None:
            load_weights(self.ema.module, averaged, path)
            self.ema.num_updates = state.get("ema_updates", 0)
        load_optimizer(self.optimizer, state["optimizer"], path)
        if state["scaler"]:  # empty after bf16 and fp32
            try:
                self.scaler.load_state_dict(state["scaler"])
            except (KeyError, TypeError, ValueError, RuntimeError):
                raise UserError(f"{path}: holds no state of a gradient scaler of this torch") from None


def prepare(config: Config, processes: Processes, *, begins: bool = True, threads: int | None = None) -> Run:
    """Opens the shards, makes the model and places it. The weights' start follows from the seed, or `train.start_from`,
    which is not looked at unless the run `begins`: what continues has weights, and `threads` is the number of torch's
    threads that it began with.

    Raises:
        UserError: config, data and machine do not fit together.
    """
    device, options = processes.device, config.train
    chosen = [use_threads(processes.shard.local_world_size, threads)] if device.type == "cpu" else []
    data, augment = config.data, config.augment
    train_loader = make_loader(data, augment, "train", processes.shard, device, seed=config.seed)
    val_loader = make_loader(data, augment, "val", processes.shard, device, seed=config.seed)
    num_classes = config.model.num_classes or len(train_loader.manifest.classes)
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

    choices = choose_step(look_at(device), amp=options.amp, compile=options.compile, optimizer=config.optim.name)
    dtype, options = choices.dtype, replace(options, compile=choices.compile)
    torch.manual_seed(config.seed)
    model = SdPNet(config.model.options(num_classes))
    notes = [str(choice) for choice in chosen]
    if options.start_from and begins:
        classes = train_loader.manifest.classes
        notes.append(start_from(model, options.start_from, classes, options.other_classes))
    model = model.to(device)
    model.checkpointing = options.checkpoint_activations
    batch_size, image_size = config.data.batch_size_per_gpu, config.data.image_size
    notes += choose_depthwise(options, model, batch_size, image_size, dtype, processes)
    ema = ModelEma(model, config.ema) if config.ema.decay else None
    of_probe = min(batch_size, options.micro_batch if isinstance(options.micro_batch, int) else _PROBED_IMAGES)
    memory_format = choose_memory_format(options.memory_format, model, of_probe, image_size, dtype, processes)
    model = model.to(memory_format=memory_format)
    if ema is not None:
        ema.module.to(memory_format=memory_format)  # of other strides, each tensor would be averaged by itself
    if options.memory_format == "probe":
        notes.append(f"memory format: {str(memory_format).removeprefix('torch.')} is faster here")
    loss = make_loss(config.loss)
    beside = batch_size if device.type == "cuda" else 0
    one_pass = training_pass(model, loss, image_size=image_size, num_classes=num_classes, dtype=dtype, beside=beside)
    micro_batch = choose_micro_batch(options.micro_batch, batch_size, model, one_pass, processes)
    if micro_batch < batch_size:
        notes.append(f"micro batches of {micro_batch}: batch norm sees these")
    synchronized = options.sync_batch_norm and processes.world_size > 1
    if synchronized:  # after the probes, whose tries differ
        synchronize_batch_norm(model, device)
    if options.compile:  # what is synchronized waits for the device in its middle
        compile_blocks([*([] if synchronized else model.conv_blocks), *model.transformer_blocks])
    scaler = torch.amp.GradScaler(device.type, enabled=choices.scaler)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if processes.world_size > 1 else None
    return Run(
        config=config,
        processes=processes,
        train_loader=train_loader,
        val_loader=val_loader,
        stage=DeviceStage(config.augment, num_classes, dtype, train=True),
        val_stage=DeviceStage(config.augment, num_classes, dtype, train=False),
        side=SideStream(device),
        model=model,
        ddp=ddp,
        loss=loss,
        one_pass=None if ddp else one_pass,
        ema=ema,
        optimizer=make_optimizer(model, config.optim, fused=choices.late or None),
        scaler=scaler,
        guard=Guard(options, model, scaler, processes),
        choices=choices,
        memory_format=memory_format,
        micro_batch=micro_batch,
        notes=notes,
    )


def introduction(run: Run) -> Iterator[str]:
    """What the user is told before the first step."""
    config, processes = run.config, run.processes
    if config.data.pipeline == "auto":
        shards = run.train_loader.manifest.splits[config.data.train_split]
        yield f"pipeline: auto chose {choose_pipeline(processes.device, shards.format)}"
    yield (
        f"{config.model.name}: {run.model.num_parameters:,} parameters, {str(run.dtype).removeprefix('torch.')} on "
        f"{processes.world_size} x {processes.device.type}, global batch {run.global_batch_size}, "
        f"{run.steps_per_epoch} steps an epoch, {config.train.epochs} epochs, peak lr {run.peak_learning_rate:.3g}"
    )
    if processes.device.type == "cuda":
        yield f"step on {torch.cuda.get_device_name(processes.device)}: {run.choices}"
    yield from run.notes
