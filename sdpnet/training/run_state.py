"""The state of one training run: its loaders, its training step and its progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sdpnet.checkpoints.model import ModelCard, load_optimizer, load_weights, save_model
from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.loading.image_loader import ImageLoader
from sdpnet.model.sdpnet import SdPNet
from sdpnet.optim.ema import ModelEma
from sdpnet.optim.learning_rate import learning_rate, peak_learning_rate
from sdpnet.optim.nonfinite import Guard, Verdict
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.reporting.step_profile import StepProfile
from sdpnet.training.step import TrainingStep

__all__ = ["Cursor", "Run", "take_step"]


@dataclass
class Cursor:
    """The progress of a training: the epoch, the steps taken in it, and the total number of optimizer steps."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


@dataclass
class Run:
    """One training run.

    What changes while it trains is in `training_step`, `cursor` and `evaluation` (the scores of the last epoch that was
    scored). `notes` are lines for the user.
    """

    config: Config
    train_loader: ImageLoader
    val_loader: ImageLoader
    training_step: TrainingStep
    notes: list[str]
    cursor: Cursor = field(default_factory=Cursor)
    evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def processes(self) -> Processes:
        return self.training_step.processes

    @property
    def model(self) -> SdPNet:
        return cast(SdPNet, self.training_step.model)

    @property
    def ema(self) -> ModelEma | None:
        return self.training_step.ema

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.training_step.optimizer

    @property
    def guard(self) -> Guard:
        return self.training_step.guard

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
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(
            self.cursor.step,
            self.config.optim,
            peak=self.peak_learning_rate,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.config.train.epochs,
        )

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models to evaluate, by the prefix of their metrics: the model and, if there is one, its average."""
        return {"": self.model, **({"ema_": self.ema.module} if self.ema else {})}

    @property
    def order(self) -> dict[str, int | str]:
        """The values that the order of samples depends on. A run can continue only if all of them are the same."""
        plan = self.train_loader.source.plan
        return {
            "seed": self.config.seed,
            "global_batch_size": self.global_batch_size,
            "num_samples": plan.num_samples,
            "data.order": self.config.data.order,
            "data.sampling": plan.sampling.summary,
        }

    @property
    def data(self) -> dict[str, str]:
        """The fingerprints of the splits for training and evaluation, which identify their images."""
        options, splits = self.config.data, self.train_loader.manifest.splits
        return {name: splits[name].fingerprint for name in (options.train_split, options.val_split)}

    @property
    def world(self) -> dict[str, int]:
        """The spread of a global batch over the processes, which may change when a run continues."""
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

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint. It has no state of torch's generators: their draws follow from the cursor."""
        return {
            "version": 2,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "ema_updates": self.ema.num_updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.training_step.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "cursor": asdict(self.cursor),
            "order": self.order,
            "world": self.world,
            "data": self.data,
            "evaluation": self.evaluation,
            "card": asdict(self.card),
            "config": asdict(self.config),
            "threads": torch.get_num_threads(),  # on a CPU, the last bits of sums depend on it
        }

    def save_model(self, directory: Path) -> bool:
        """Writes the finished model, with the averaged weights if there are any. Returns False if it exists already."""
        return save_model(directory, self.model, self.card, self.ema.module.state_dict() if self.ema else None)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Continues from a state that `state()` returned. Raises `UserError` if `path` is that of another model."""
        self.restore(path, state)
        cursor = Cursor(**state["cursor"])
        if cursor.step_in_epoch > self.steps_per_epoch:
            steps = f"step {cursor.step_in_epoch} of an epoch of {self.steps_per_epoch}"
            raise UserError(f"{path}: is at {steps}, so it is not from this run; start a new run in another --out")
        self.guard.load_state_dict({"bad_steps": [], **state.get("guard", {})})
        self.cursor = cursor
        self.evaluation = state["evaluation"]

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Loads weights, averages, optimizer and scaler, but not the place in the order of samples."""
        averaged = state.get("ema")
        if (averaged is None) != (self.ema is None):
            has = "no" if averaged is None else "an"
            raise UserError(f"{path}: has {has} average of the weights; set ema.decay as that run had it")
        load_weights(self.model, state["model"], path)
        if self.ema is not None and averaged is not None:
            load_weights(self.ema.module, averaged, path)
            self.ema.num_updates = state.get("ema_updates", 0)
        load_optimizer(self.optimizer, state["optimizer"], path)
        if state["scaler"]:  # it is empty after training in bf16 or fp32
            try:
                self.training_step.scaler.load_state_dict(state["scaler"])
            except (KeyError, TypeError, ValueError, RuntimeError):
                raise UserError(f"{path}: holds no state of a gradient scaler of this torch") from None


def take_step(run: Run, batches: Iterator[Batch], profile: StepProfile) -> tuple[torch.Tensor, torch.Tensor, Verdict]:
    """Takes the next optimizer step of a run; its cursor moves on, whether or not the step was skipped.

    Returns the loss, the norm of the gradients and the guard's verdict, as `TrainingStep` does.
    """
    result = run.training_step(batches, run.cursor.step + 1, run.learning_rate, profile)
    profile.step()
    run.cursor.step += 1
    run.cursor.step_in_epoch += 1
    return result
