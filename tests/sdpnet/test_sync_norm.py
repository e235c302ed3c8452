"""Batch norm over two processes against one process with the whole batch, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import run_group
from torch import nn

from sdpnet.distributed.processes import join_group, leave_group
from sdpnet.execution.sync_norm import synchronize_batch_norm

WORLD = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.GELU(), nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    )
    nn.init.normal_(net[1].weight)
    return net.double()


def inputs() -> torch.Tensor:
    return torch.randn(6, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 10


def of_one_rank() -> tuple[Any, ...]:
    rank = join_group("cpu").shard.rank
    net = synchronize_batch_norm(network(), torch.device("cpu"))
    part = inputs()[:2] if rank == 0 else inputs()[2:]  # of different sizes
    outputs = net(part)
    outputs.square().sum().backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    evaluated = net.eval()(part)
    leave_group()
    return outputs.detach(), gradients, net.state_dict(), evaluated.detach()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    parts = run_group(of_one_rank, world_size=WORLD, scratch=tmp_path)
    net = network()
    outputs = net(inputs())
    outputs.square().sum().backward()
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), outputs)
    for part in parts:
        torch.testing.assert_close(part[1], [parameter.grad for parameter in net.parameters()])
        torch.testing.assert_close(part[2], net.state_dict())
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), net.eval()(inputs()))


def test_names_and_weights_stay() -> None:
    plain = network()
    assert list(synchronize_batch_norm(copy.deepcopy(plain), torch.device("cpu")).state_dict()) == list(
        plain.state_dict()
    )


def test_half_precision_is_normalised_in_float32() -> None:
    """As `nn.BatchNorm2d` does it; one process is a group too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        norm = nn.BatchNorm2d(4)
        ours = copy.deepcopy(nn.Sequential(norm))
        ours = synchronize_batch_norm(ours, torch.device("cpu"))
        x = (torch.randn(3, 4, 19, 19) * 3 + 10).bfloat16()  # more samples a channel than bfloat16 counts exactly
        expected, outputs = norm(x), ours(x)
    finally:
        dist.destroy_process_group()
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(ours[0].running_var, norm.running_var)
