"""The choice between PyTorch's and our update of weights and average (`train.update`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from sdpnet.config.options import Config
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants.choice import NEEDS_TRITON, Pass, Variants, choose
from sdpnet.optim.ema import ModelEma
from sdpnet.optim.fused_update import TritonUpdate, runs_on
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.optim.update import TorchUpdate, Update
from sdpnet.pipelines.errors import UserError

__all__ = ["choose_update", "make_update", "update_variants"]

_UPDATES: Final = {"torch": TorchUpdate, "triton": TritonUpdate}


def make_update(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEma | None, clip_grad_norm: float
) -> Update:
    """The update with a name that `choose_update` returns. Raises `UserError` where it is not possible."""
    return _UPDATES[name](model, optimizer, ema, clip_grad_norm)


def update_variants(config: Config, model: nn.Module) -> Variants:
    """PyTorch's and our update of the weights of `model`, with gradients, weights and averages that are made up.

    A pass returns weights, averages and moments. `model` does not change.
    """
    device = next(model.parameters()).device
    size = sum(parameter.numel() for parameter in model.parameters())
    what = f"{config.optim.name}, {size} weights in {len(list(model.parameters()))} tensors"
    what += f", ema {config.ema.decay > 0}, clipped {config.optim.clip_grad_norm > 0}"

    def make(name: str) -> Pass:
        if name == "triton" and not runs_on(device):
            raise UserError(NEEDS_TRITON)
        generator = torch.Generator(device).manual_seed(0)
        imitation = copy.deepcopy(model)
        ema = ModelEma(imitation, config.ema) if config.ema.decay else None
        optimizer = make_optimizer(imitation, config.optim)
        update = make_update(name, imitation, optimizer, ema, config.optim.clip_grad_norm)
        with torch.no_grad():
            for parameter in imitation.parameters():
                # Weights as large as the step show differences of the step.
                parameter.normal_(std=config.optim.lr, generator=generator)
                parameter.grad = torch.empty_like(parameter).normal_(generator=generator)
        bad = torch.zeros((), device=device)

        def one_pass() -> Sequence[torch.Tensor]:
            update.grad_norm()
            update.step(bad)
            update.average(bad)
            state = optimizer.state_dict()
            states = [part["state"] for part in (state.values() if config.optim.name == "muon" else [state])]
            moments = [value for part in states for row in part.values() for value in row.values()]
            averages = list(ema.module.parameters()) if ema is not None else []
            return [*imitation.parameters(), *averages, *moments]

        return one_pass

    return Variants("train.update", what, {name: lambda name=name: make(name) for name in _UPDATES})  # type: ignore[misc]


def choose_update(config: Config, model: nn.Module, processes: Processes) -> tuple[str, list[str]]:
    """The name of the update that `train.update` says, and lines for the user. Every process must call it.

    Raises:
        UserError: `triton` is asked for where it cannot run.
    """
    if config.train.update == "auto" and not runs_on(processes.device):
        return "torch", []
    return choose(update_variants(config, model), config.train.update, processes)
