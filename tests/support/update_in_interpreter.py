"""Tests of the update's kernels in Triton's interpreter, which is on or off for a whole process.

tests/sdpnet/test_update.py runs this file. The oracles are PyTorch's AdamW in float64, and `ModelEma`.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

from sdpnet.config.options import EmaOptions, OptimOptions
from sdpnet.model.sdpnet import SdPNet, create_model_options
from sdpnet.optim import fused_update
from sdpnet.optim.ema import ModelEma
from sdpnet.optim.fused_update import TritonUpdate
from sdpnet.optim.learning_rate import set_learning_rate
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.optim.update import TorchUpdate, Update
from sdpnet.pipelines.errors import UserError

assert os.environ["TRITON_INTERPRET"] == "1"
LAUNCH = {"BLOCK": 32, "BLOCKS": 2, "num_warps": 1}
GOOD, BAD = torch.zeros(()), torch.ones(())


class Sides:
    """Equal models with different updates, and a float64 copy with PyTorch's."""

    def __init__(self, clip: float = 0.0, warmup: bool = True, averaged: bool = True) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Linear(5, 5))  # tensors of 5 to 189 values
        model.to(memory_format=torch.channels_last)
        self.models = {"triton": model, "torch": copy.deepcopy(model), "exact": copy.deepcopy(model).double()}
        self.emas = {
            name: ModelEma(model, EmaOptions(0.6, warmup)) if averaged else None for name, model in self.models.items()
        }
        self.optimizers = {name: self.optimizer(name) for name in self.models}
        self.updates = {name: self.update(name, clip) for name in self.models}

    def optimizer(self, name: str) -> torch.optim.AdamW:
        conv, norm, linear = self.models[name]
        groups = [
            {"params": list(conv.parameters()), "lr_scale": 0.5, "weight_decay": 0.3},
            {"params": [*norm.parameters(), linear.bias], "lr_scale": 1.0, "weight_decay": 0.0},
            {"params": [linear.weight], "lr_scale": 1.0, "weight_decay": 0.1},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-6, fused=None if name == "exact" else True)

    def update(self, name: str, clip: float) -> Update:
        arguments = self.models[name], self.optimizers[name], self.emas[name], clip
        return TritonUpdate(*arguments, LAUNCH) if name == "triton" else TorchUpdate(*arguments)

    def give_gradients(self, seed: int, value: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(p.shape, generator=generator) for p in self.models["torch"].parameters()]
        gradients[0][0, 0] += value
        for model in self.models.values():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            model[1].running_mean += seed
            model[1].num_batches_tracked += 1

    def step(self, seed: int, bad: torch.Tensor = GOOD) -> None:
        self.give_gradients(seed, float("nan") if bad else 0.0)
        norms = []
        for name, update in self.updates.items():
            set_learning_rate(self.optimizers[name], 0.1 / (1 + seed))
            norms.append(update.grad_norm().double())
            update.step(bad)
            update.average(bad)
        for norm in norms:
            torch.testing.assert_close(norm, norms[-1], rtol=1e-6, atol=0.0, equal_nan=True)

    def assert_same(self, tolerance: float = 2e-6) -> None:
        exact = self.models["exact"].state_dict()
        for name in ("triton", "torch"):
            for key, value in self.models[name].state_dict().items():
                torch.testing.assert_close(value.double(), exact[key].double(), rtol=tolerance, atol=tolerance)
            for index, state in self.optimizers[name].state_dict()["state"].items():
                expected = self.optimizers["exact"].state_dict()["state"].get(index)
                if expected is None:  # it is made in the first step that is taken
                    continue
                assert list(state) == list(expected) and state["step"].dtype == torch.float32
                for key, value in state.items():
                    torch.testing.assert_close(value.double(), expected[key].double(), rtol=tolerance, atol=tolerance)
        ours, theirs = self.emas["triton"], self.emas["torch"]
        if ours is not None and theirs is not None:
            assert ours.num_updates == theirs.num_updates
            expected = theirs.module.state_dict()
            for key, value in ours.module.state_dict().items():
                torch.testing.assert_close(value, expected[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_equals_pytorch_in_float64(clip: float) -> None:
    sides = Sides(clip)
    for seed in range(4):
        sides.step(seed)
        sides.assert_same()
    assert (
        sides.optimizers["triton"].state_dict()["param_groups"]
        == sides.optimizers["torch"].state_dict()["param_groups"]
    )


def test_the_average_is_equal_to_the_last_bit() -> None:
    sides = Sides(warmup=False)
    ema = sides.emas["triton"]
    assert ema is not None
    before = copy.deepcopy(ema.module.state_dict())
    sides.step(3)
    weight = torch.tensor(1 - 0.6, dtype=torch.float64).float()
    for key, value in sides.models["triton"].state_dict().items():
        expected = before[key] + (value - before[key]) * weight if value.is_floating_point() else value
        assert torch.equal(ema.module.state_dict()[key], expected)


@pytest.mark.parametrize("when", [0, 2])
def test_a_bad_step_changes_nothing(when: int) -> None:
    sides = Sides(clip=0.7)
    for seed in range(4):
        sides.step(seed, BAD if seed == when else GOOD)
        sides.assert_same()
    assert {state["step"].item() for state in sides.optimizers["triton"].state.values()} == {3.0}


@pytest.mark.parametrize("first", ["triton", "torch"])
def test_a_run_continues_with_the_other_update(first: str) -> None:
    sides = Sides()
    for seed in range(2):
        sides.step(seed)
    second = "torch" if first == "triton" else "triton"
    state = copy.deepcopy(sides.optimizers[first].state_dict())
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].contiguous()  # as a run in another format saved it
    if second == "triton":
        sides.optimizers[second].load_state_dict(state)
    else:
        sides.optimizers[second].load_state_dict(copy.deepcopy(sides.optimizers[first].state_dict()))
    for seed in (2, 3):
        sides.step(seed)
        sides.assert_same()


def test_without_an_average() -> None:
    sides = Sides(averaged=False)
    sides.step(0)
    sides.step(1)
    sides.assert_same()


def test_gradients_that_are_missing_or_at_odd_addresses() -> None:
    sides = Sides()
    sides.step(0)
    sides.give_gradients(1)
    for model in sides.models.values():
        model[0].weight.grad = None
        gradient = model[2].weight.grad
        flat = torch.empty(26, dtype=gradient.dtype)
        flat[1:].copy_(gradient.flatten())
        model[2].weight.grad = flat[1:].view(5, 5)
    for name, update in sides.updates.items():
        set_learning_rate(sides.optimizers[name], 0.1)
        update.grad_norm()
        update.step(GOOD)
        update.average(GOOD)
    sides.assert_same()
    sides.step(2)
    sides.assert_same()
    steps = [state["step"].item() for state in sides.optimizers["triton"].state.values()]
    assert sorted(steps) == [2.0, 3.0, 3.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_whole_model(name: str) -> None:
    """With layer-wise rates, a parameter without values (registers), and Muon's part by PyTorch."""
    options = OptimOptions(name=name, layer_decay=0.7)  # type: ignore[arg-type]
    small = {"dim": 8, "heads": 2, "conv_blocks": 1, "transformer_blocks": 1, "kernel_size": 3, "registers": 0}
    torch.manual_seed(0)
    model = SdPNet(create_model_options("sdpnet_tiny", 3, head_hidden=4, **small))
    states = []
    for update_type in (TorchUpdate, TritonUpdate):
        twin = copy.deepcopy(model)
        optimizer, ema = make_optimizer(twin, options, fused=True), ModelEma(twin, EmaOptions(0.9))
        update = update_type(twin, optimizer, ema, 0.5)
        for seed in range(2):
            set_learning_rate(optimizer, 1e-2)
            generator = torch.Generator().manual_seed(seed)
            for parameter in twin.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            update.grad_norm()
            update.step(GOOD)
            update.average(GOOD)
        states.append({**twin.state_dict(), **{f"ema.{k}": v for k, v in ema.module.state_dict().items()}})
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_what_the_kernels_do_not_take() -> None:
    layer = nn.Linear(3, 3)
    for options, model, reason in (
        ({"fused": False}, layer, "fused"),
        ({"fused": True, "amsgrad": True}, layer, "amsgrad"),
        ({"fused": True}, copy.deepcopy(layer).double(), "float32"),
    ):
        with pytest.raises(UserError, match=reason):
            TritonUpdate(model, torch.optim.AdamW(model.parameters(), **options), None, 0.0)
    assert not fused_update.runs_on(torch.device("cpu"))
