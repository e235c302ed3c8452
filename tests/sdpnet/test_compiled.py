"""Compiled blocks: how many graphs they share, and that DDP and checkpointing go with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.variants import choice, conv_block
from sdpnet.model.sdpnet import ConvBlock, SdPNet, create_model
from sdpnet.pipelines.options import ShardOptions

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graphs of other tests, torch's own options afterwards, and a compiler that only traces."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="aot_eager"))
    with torch._dynamo.config.patch():
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()


def trained(model: nn.Module, size: int = 32, batch: int = 4) -> None:
    model(torch.randn(batch, 3, size, size)).square().mean().backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rates_of_their_own_share_graphs(checkpointing: bool) -> None:
    """Twelve blocks with as many rates, more than torch makes graphs for by default."""
    model = create_model("sdpnet_tiny", 10, conv_blocks=6, transformer_blocks=6, dim=32, heads=2, drop_path=0.5)
    model.checkpointing = checkpointing
    compile_blocks([*model.conv_blocks, *model.transformer_blocks])
    trained(model)
    # With and without a rate, and each kind's recomputation when checkpointed, not one for each rate.
    assert 3 <= counters["stats"]["unique_graphs"] <= 8
    assert not counters["graph_break"] and "recompile_limit" not in str(counters)


@pytest.mark.slow
def test_other_sizes_and_evaluation_stay_compiled() -> None:
    model = create_model("sdpnet_tiny", 10, conv_blocks=2, transformer_blocks=1, dim=32, heads=2, drop_path=0.2)
    compile_blocks([*model.conv_blocks, *model.transformer_blocks])
    calls: list[int] = []
    for size in (32, 48, 64, 80, 96):
        trained(model.train(), size)
        with torch.inference_mode():
            model.eval()(torch.randn(4, 3, size, size))
        calls.append(counters["stats"]["calls_captured"])
    graphs = counters["stats"]["unique_graphs"]
    for size in (112, 128):  # sizes are dynamic by now
        trained(model.train(), size)
    assert counters["stats"]["unique_graphs"] == graphs and calls[0] > 0


def test_with_ddp_and_checkpointing() -> None:
    """Weights of more than the megabyte at which DDP cuts graphs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = create_model("sdpnet_tiny", 10, conv_blocks=2, transformer_blocks=1, dim=544, heads=2)
        assert isinstance(model, SdPNet) and model.conv_blocks[0].pointwise.weight.nbytes > 2**20
        model.checkpointing = True
        compile_blocks([*model.conv_blocks, *model.transformer_blocks])
        trained(DistributedDataParallel(model, gradient_as_bucket_view=True))
    finally:
        dist.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_block_that_was_timed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(variants: choice.Variants, *_: object) -> tuple[str, list[str]]:
        measured = choice.race(variants, torch.device("cpu"), rounds=1)
        return min(name for name, row in measured.items() if row.seconds), []

    monkeypatch.setattr(conv_block, "runs_on", lambda device: True)
    monkeypatch.setattr(conv_block, "choose", race)
    model = create_model("sdpnet_tiny", 10, conv_blocks=1, transformer_blocks=1, dim=8, heads=2, kernel_size=3)
    assert isinstance(model, SdPNet)
    options = TrainOptions(compile=True, conv_block="torch")
    alone = Processes(ShardOptions(), torch.device("cpu"))
    conv_block.choose_conv_block(options, model, 2, 32, torch.float32, alone)
    assert not model.conv_blocks[0].triton
    block = ConvBlock(8, 3, 0.0)
    compile_blocks([block])
    counters.clear()
    block(torch.randn(6, 8, 4, 4))
    # Had it seen the two images before, six would make the batch's size a symbol.
    assert counters["stats"]["unique_graphs"] == 1
    block(torch.randn(6, 8, 4, 4))
    assert counters["stats"]["unique_graphs"] == 1
