"""One optimizer step: batches, forward and backward passes, and what ends the step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sdpnet.execution.micro_batch import out_of_memory, parts
from sdpnet.optim.nonfinite import Verdict
from sdpnet.optim.optimizer import learning_rate, set_learning_rate
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.planning.draws import derive_seed
from sdpnet.reporting.step_profile import StepProfile
from sdpnet.training.setup import Run

__all__ = ["take_step"]


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
