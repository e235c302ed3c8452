"""The probe leaves a model as it was, and picks the faster of two formats, one of which is made slow here."""

from __future__ import annotations

import time

import pytest
import torch

from sdpnet.distributed.processes import Processes
from sdpnet.execution.memory_format import choose_memory_format
from sdpnet.model.sdpnet import SdPNet, create_model_options
from sdpnet.pipelines.options import ShardOptions

ALONE = Processes(ShardOptions(), torch.device("cpu"))


class SlowIn(torch.nn.Module):
    """A model that takes a tenth of a second longer in one format."""

    def __init__(self, slow: torch.memory_format) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.slow = slow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous(memory_format=self.slow):
            time.sleep(0.1)
        return self.conv(x)


@pytest.mark.parametrize(
    ("slow", "fast"),
    [(torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)],
)
def test_the_faster_one_is_chosen(slow: torch.memory_format, fast: torch.memory_format) -> None:
    assert choose_memory_format("probe", SlowIn(slow), 2, 32, torch.float32, ALONE) == fast


def test_nothing_but_the_format_changes() -> None:
    torch.manual_seed(0)
    options = create_model_options("sdpnet_tiny", num_classes=3, dropout=0.5)
    model = SdPNet(options).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    choose_memory_format("probe", model, 2, 32, torch.float32, ALONE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_choice_needs_no_probe() -> None:
    model = SlowIn(torch.channels_last)
    assert choose_memory_format("channels_last", model, 2, 32, torch.float32, ALONE) == torch.channels_last
    assert choose_memory_format("contiguous", model, 2, 32, torch.float32, ALONE) == torch.contiguous_format
