"""One optimizer step: batches, passes forward and backward, and the update. `train`, `bench step`, `doctor` share it.

step, notes = make_training_step(config, model, num_classes, processes)
loss, grad_norm, verdict = step(batches, number=1, lr=1e-3)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.data_wait import DataWait
from sdpnet.execution.hardware import StepChoices, choose_step, look_at
from sdpnet.execution.memory_format import choose_memory_format
from sdpnet.execution.micro_batch import choose_micro_batch, out_of_memory, parts, training_pass
from sdpnet.execution.side_stream import SideStream
from sdpnet.execution.sync_norm import synchronize_batch_norm
from sdpnet.execution.variants.attention import choose_attention
from sdpnet.execution.variants.conv_block import choose_conv_block
from sdpnet.execution.variants.fp8 import choose_fp8
from sdpnet.execution.variants.mlp import choose_mlp
from sdpnet.execution.variants.patch import choose_patch
from sdpnet.execution.variants.update import choose_update, make_update
from sdpnet.model.sdpnet import SdPNet
from sdpnet.optim.ema import ModelEma
from sdpnet.optim.learning_rate import set_learning_rate
from sdpnet.optim.loss import make_loss
from sdpnet.optim.nonfinite import Guard, Verdict
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.optim.update import Update
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.planning.draws import derive_seed

__all__ = ["PARTS", "NoMarks", "StepMarks", "TrainingStep", "make_training_step"]

PARTS = ("data wait", "augment", "forward", "backward", "optimizer", "EMA")
_PROBED_IMAGES = 64  # the maximum for the probe of the memory format, which must not run out of memory itself


class StepMarks(Protocol):
    """An observer of the parts of a step, for a trace or a benchmark. A part of `PARTS` may occur several times."""

    def mark(self, part: str) -> AbstractContextManager[object]:
        """A context around the work of `part`. It must not wait for the device."""
        ...


class NoMarks:
    """Marks that do nothing."""

    def mark(self, part: str) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


@dataclass
class TrainingStep:
    """A model with everything that trains it, on one device; calling it takes one optimizer step.

    Attributes:
        model: the model that is trained: an SdP-Net or, for comparisons, any other module from images to logits.
        ddp: the DDP wrapper of `model` in several processes, else None.
        stage: makes the images and targets of a batch on the device. It runs on the stream `side`, during the step
            before.
        data_wait: measures how long a GPU waits for batches.
        one_pass: runs a forward and a backward pass over a given number of blank images; None in several processes,
            where DDP would take its gradients for those of a step.
        update: takes the optimizer's step and moves the average.
        guard: skips steps whose loss, gradients or batch-norm statistics are not finite.
        choices: the dtype and the kernels.
        micro_batch: the number of images in one forward and backward pass.
    """

    config: Config
    processes: Processes
    model: nn.Module
    ddp: DistributedDataParallel | None
    stage: DeviceStage
    side: SideStream
    data_wait: DataWait
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    one_pass: Callable[[int], None] | None
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    update: Update
    scaler: torch.amp.GradScaler
    guard: Guard
    choices: StepChoices
    memory_format: torch.memory_format
    micro_batch: int

    @property
    def network(self) -> nn.Module:
        """The module that the forward pass calls: the model, in several processes wrapped by DDP."""
        return self.ddp or self.model

    def __call__(
        self, batches: Iterator[Batch], number: int, lr: float, marks: StepMarks | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Verdict]:
        """Takes optimizer step `number` (from 1) of a run over the next `train.accumulate` batches.

        Returns:
            The loss of this process's samples; the norm of the gradients before clipping (both float32 scalars on the
            device); the guard's verdict: on a CPU on this step, on a GPU on the step before, because reading a value
            of this step would make the host wait for the device.

        Raises:
            NonFinite: see `sdpnet.optim.nonfinite`.
            UserError: the GPU's memory is too small; the message says what would fit.
        """
        marks = marks or NoMarks()
        config, device, accumulate = self.config, self.processes.device, self.config.train.accumulate
        set_learning_rate(self.optimizer, lr)
        # Dropout's draws follow from the number of the step, so a checkpoint needs no state of torch's generators.
        torch.manual_seed(derive_seed(config.seed, number - 1, self.processes.shard.rank) >> 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.keep()
        loss = torch.zeros((), device=device)
        too_large = False
        for remaining in reversed(range(accumulate)):
            images, targets = self._next_batch(batches, marks)
            micro_batches = parts(len(images), self.micro_batch)
            for part in micro_batches:
                weight = (part.stop - part.start) / len(images) / accumulate
                more_follow = remaining or part is not micro_batches[-1]  # DDP sums the gradients after the last
                try:
                    with self.ddp.no_sync() if self.ddp and more_follow else contextlib.nullcontext():
                        with marks.mark("forward"), self._autocast():
                            part_loss = self.loss(self.network(images[part]), targets[part]) * weight
                        with marks.mark("backward"):
                            self.scaler.scale(part_loss).backward()
                except torch.OutOfMemoryError:
                    too_large = (
                        True  # raised below: within this block, the traceback keeps the tensors of the step alive
                    )
                if too_large:
                    del images, targets
                    batch_size = config.data.batch_size_per_gpu
                    raise out_of_memory(self.model, self.one_pass, self.micro_batch, batch_size=batch_size)
                loss += part_loss.detach()
        return self._update(number, loss, marks)

    def _next_batch(self, batches: Iterator[Batch], marks: StepMarks) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch's images and targets for the model, made on the side stream while the device still computes
        the step before."""
        with marks.mark("data wait"), self.data_wait():
            with self.side():
                batch = next(batches)
            self.side.join()
        with marks.mark("augment"):
            with self.side():
                images, targets = self.stage(batch)
                images = images.to(memory_format=self.memory_format)
            self.side.join(images, targets)
        return images, targets

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self.choices.dtype
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype != torch.float32)

    def _update(self, number: int, loss: torch.Tensor, marks: StepMarks) -> tuple[torch.Tensor, torch.Tensor, Verdict]:
        """Updates the weights and their average, unless a value of the step is not finite."""
        with marks.mark("optimizer"):
            self.scaler.unscale_(self.optimizer)
            grad_norm = self.update.grad_norm()
            bad = self.guard.find_bad(number, loss, grad_norm)
            self.update.step(bad)
            self.scaler.update()
        with marks.mark("EMA"):
            self.update.average(bad)
        return loss, grad_norm, self.guard.verdict()


def make_training_step(
    config: Config,
    model: nn.Module,
    num_classes: int,
    processes: Processes,
    stage: DeviceStage | None = None,
) -> tuple[TrainingStep, list[str]]:
    """Makes the training step of `model` as `config` says.

    Args:
        model: an SdP-Net, on the device already. Any other module, which a benchmark compares with, is compiled as one
            graph and trained by AdamW without layer-wise rates.
        stage: makes images and targets of batches, in the dtype that is chosen here; by default, a new one is made.

    Returns:
        The step, and lines for the user about the choices for this machine.

    Raises:
        UserError: a choice of the config is not possible on this machine.
    """
    device, options = processes.device, config.train
    choices = choose_step(look_at(device), amp=options.amp, compile=options.compile)
    dtype, options = choices.dtype, replace(options, compile=choices.compile)
    stage = stage or DeviceStage(config.augment, num_classes, dtype, train=True)
    assert stage.dtype == dtype, f"{stage.dtype} != {dtype}"
    batch_size, image_size = config.data.batch_size_per_gpu, config.data.image_size
    notes: list[str] = []
    if isinstance(model, SdPNet):
        model.checkpointing = options.checkpoint_activations
        for choose_part in (choose_patch, choose_conv_block, choose_attention, choose_mlp):
            notes += choose_part(options, model, batch_size, image_size, dtype, processes)
    ema = ModelEma(model, config.ema) if config.ema.decay else None
    probe_size = min(batch_size, options.micro_batch if isinstance(options.micro_batch, int) else _PROBED_IMAGES)
    memory_format: Any = choose_memory_format(options.memory_format, model, probe_size, image_size, dtype, processes)
    model = model.to(memory_format=memory_format)
    if ema is not None:
        ema.module.to(memory_format=memory_format)  # with other strides, torch would average each tensor separately
    if options.memory_format == "probe":
        notes.append(f"memory format: {str(memory_format).removeprefix('torch.')} is faster here")
    update, lines = choose_update(config, model, processes)
    notes += lines
    if isinstance(model, SdPNet):
        notes += choose_fp8(options, model, batch_size, image_size, dtype, processes)
    loss = make_loss(config.loss)
    beside = batch_size if device.type == "cuda" else 0
    one_pass = training_pass(model, loss, image_size=image_size, num_classes=num_classes, dtype=dtype, beside=beside)
    micro_batch = choose_micro_batch(options.micro_batch, batch_size, model, one_pass, processes)
    if micro_batch < batch_size:
        notes.append(f"micro batches of {micro_batch}: batch norm sees these")
    synchronized = options.sync_batch_norm and processes.world_size > 1
    if synchronized:  # after the probes: processes may need different numbers of tries, and would wait for each other
        synchronize_batch_norm(model, device)
    if options.compile and isinstance(model, SdPNet):
        # A synchronized block waits for the other processes in its middle, which a compiled graph cannot do.
        compile_blocks([*([] if synchronized else model.conv_blocks), *model.transformer_blocks])
    elif options.compile:
        compile_blocks([model])
    scaler = torch.amp.GradScaler(device.type, enabled=choices.scaler)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if processes.world_size > 1 else None
    optimizer = make_optimizer(model, config.optim, fused=choices.asynchronous or None)
    step = TrainingStep(
        config=config,
        processes=processes,
        model=model,
        ddp=ddp,
        stage=stage,
        side=SideStream(device),
        data_wait=DataWait(device),
        loss=loss,
        one_pass=None if ddp else one_pass,
        ema=ema,
        optimizer=optimizer,
        update=make_update(update, model, optimizer, ema, config.optim.clip_grad_norm),
        scaler=scaler,
        guard=Guard(options, model, scaler, processes, asynchronous=choices.asynchronous),
        choices=choices,
        memory_format=memory_format,
        micro_batch=micro_batch,
    )
    return step, notes
