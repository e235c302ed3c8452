"""Tests of the depthwise kernels in Triton's interpreter, which is on or off for a whole process.

tests/sdpnet/test_depthwise.py runs this file. The oracle is PyTorch's convolution and GELU in float64. The interpreter
truncates to bfloat16 instead of rounding.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sdpnet.model.kernels import depthwise
from sdpnet.model.kernels.depthwise import depthwise_gelu
from sdpnet.model.sdpnet import ConvBlock, SdPNet, create_model_options

assert os.environ["TRITON_INTERPRET"] == "1"
Tensors = tuple[torch.Tensor, ...]


def inputs_of(
    batch: int, dim: int, height: int, width: int, kernel: int, dtype: torch.dtype = torch.float32
) -> Tensors:
    """x, weight, bias, and a gradient of the result."""
    generator = torch.Generator().manual_seed(batch * dim + height * width + kernel)
    shapes = (batch, dim, height, width), (dim, 1, kernel, kernel), (dim,), (batch, dim, height, width)
    x, weight, bias, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    x, gradient = (image.to(dtype, memory_format=torch.channels_last) for image in (x, gradient))
    return x.requires_grad_(), (weight * 1.5 / kernel).requires_grad_(), bias.requires_grad_(), gradient


def in_float64(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gradient: torch.Tensor) -> Tensors:
    """The result and the gradients of x, weight and bias, computed by PyTorch in float64."""
    x, weight, bias = (value.detach().double().requires_grad_() for value in (x, weight, bias))
    out = F.gelu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)))
    return out.detach(), *torch.autograd.grad(out, (x, weight, bias), gradient.double())


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gradient: torch.Tensor) -> Tensors:
    out = depthwise_gelu(x, weight, bias)
    return out.detach(), *torch.autograd.grad(out, (x, weight, bias), gradient)


def assert_close(found: Tensors, expected: Tensors, tolerance: float) -> None:
    """Requires that differences are within `tolerance`, relative to the largest expected value of each tensor."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ((ours.double() - theirs).abs() <= tolerance * theirs.abs().max()).all()


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 5, 4, 3), 3),
        ((1, 3, 1, 1), 3),
        ((1, 2, 1, 6), 5),
        ((2, 3, 4, 5), 5),
        ((2, 2, 5, 4), 7),  # the filter is wider than the image
        ((1, 65, 2, 3), 7),  # one channel in the second block
        ((1, 2, 6, 7), 9),
    ],
)
def test_equals_pytorch_in_float64(shape: tuple[int, int, int, int], kernel: int) -> None:
    inputs = inputs_of(*shape, kernel)
    assert_close(ours(*inputs), in_float64(*inputs), 1e-6)


@pytest.mark.parametrize(("tile", "programs"), [(3, 1), (2, 4), (3, 1000)])
def test_tiles_meet(tile: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in both directions, the last ones not full; a program sums over all, some or one of them."""
    monkeypatch.setattr(depthwise, "_TILE", tile)
    monkeypatch.setattr(depthwise, "_PROGRAMS", programs)
    inputs = inputs_of(2, 3, 5, 4, 3)
    assert_close(ours(*inputs), in_float64(*inputs), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded(dtype: torch.dtype) -> None:
    """Differences of two units in the last place: the result is rounded, and so is GELU's derivative for backward."""
    x, weight, bias, gradient = inputs_of(1, 4, 3, 5, 3, dtype)
    found = ours(x, weight, bias, gradient)
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32, torch.float32]
    assert_close(found, in_float64(x, weight, bias, gradient), 2 * torch.finfo(dtype).eps)
    halves = ours(x, *(value.detach().to(dtype).requires_grad_() for value in (weight, bias)), gradient)
    assert all(value.dtype == dtype for value in halves)


def test_gelu_far_from_zero() -> None:
    """GELU itself, by a filter with a single 1, and its derivative, from -12 to 12."""
    x = torch.linspace(-12, 12, 49).reshape(1, 1, 7, 7).requires_grad_()
    weight, bias = (torch.arange(9) == 4).float().reshape(1, 1, 3, 3), torch.zeros(1)
    out = depthwise_gelu(x, weight, bias)
    (slope,) = torch.autograd.grad(out.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    assert ((out - expected).abs() <= 4e-7 * exact.abs().clamp(min=1)).all()
    assert ((slope - expected_slope).abs() <= 1e-6).all()


def test_layouts_and_gradients_that_are_views() -> None:
    x, weight, bias, gradient = inputs_of(1, 3, 3, 4, 3)
    expected = ours(x, weight, bias, gradient)
    planes = x.detach().contiguous().requires_grad_()
    found = ours(planes, weight.to(memory_format=torch.channels_last), bias, gradient.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    of_sum = torch.autograd.grad(depthwise_gelu(x, weight, bias).sum(), (x, weight, bias))
    assert_close(of_sum, in_float64(x, weight, bias, torch.ones_like(gradient))[1:], 1e-6)


def test_without_gradients_no_derivative_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, gradient = inputs_of(2, 3, 4, 4, 3)
    with torch.no_grad():
        out = depthwise_gelu(x, weight, bias)
    assert_close((out,), in_float64(x, weight, bias, gradient)[:1], 1e-6)
    assert torch.ops.sdpnet.depthwise_gelu(x.detach(), weight.detach(), bias.detach(), False)[1].numel() == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_finds_no_fault_with_the_operations(dtype: torch.dtype) -> None:
    x, weight, bias, gradient = inputs_of(2, 3, 4, 5, 3, dtype)
    tolerances = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.float16 else {}
    for training in (True, False):
        inputs = [x, weight, bias] if training else [value.detach() for value in (x, weight, bias)]
        torch.library.opcheck(torch.ops.sdpnet.depthwise_gelu, (*inputs, training), **tolerances)
    backward = (gradient, torch.rand_like(gradient), x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.sdpnet.depthwise_gelu_backward, backward, **tolerances)


def blocks(dim: int = 6) -> tuple[ConvBlock, ConvBlock, torch.Tensor]:
    """Two equal blocks, the second one with our kernels, and an input."""
    torch.manual_seed(0)
    plain = ConvBlock(dim, 3, 0.0)
    fused = copy.deepcopy(plain)
    fused.triton = True
    return plain, fused, torch.randn(2, dim, 4, 5).to(memory_format=torch.channels_last)


def assert_same_step(plain: ConvBlock, fused: torch.nn.Module, x: torch.Tensor, tolerance: float) -> None:
    outs, gradients = [], []
    for block in (plain, fused):
        block.zero_grad()
        image = x.clone().requires_grad_()
        out = block(image)
        (out.float() * torch.arange(out.numel()).reshape(out.shape).sin()).sum().backward()
        outs.append(out)
        gradients.append([image.grad, *(parameter.grad for parameter in block.parameters())])
    assert outs[0].dtype == outs[1].dtype
    torch.testing.assert_close(outs[1], outs[0], atol=tolerance, rtol=tolerance)
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=20 * tolerance, rtol=20 * tolerance)


def test_conv_block() -> None:
    plain, fused, x = blocks()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same_step(plain, fused, x, 1e-5)


def test_autocast() -> None:
    plain, fused, x = blocks()
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_gelu(x, fused.depthwise.weight, fused.depthwise.bias)
        assert out.dtype == torch.bfloat16
        assert_same_step(plain, fused, x, 0.05)


def test_compiled_in_one_graph() -> None:
    plain, fused, x = blocks()
    assert_same_step(plain, torch.compile(fused, backend="aot_eager", fullgraph=True), x, 1e-5)


def test_distributed(tmp_path: Path) -> None:
    plain, fused, x = blocks()
    fused.to(memory_format=torch.channels_last)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert_same_step(plain, DistributedDataParallel(fused, gradient_as_bucket_view=True), x, 1e-5)
    finally:
        dist.destroy_process_group()


def test_recomputed_activations() -> None:
    """The model with checkpointing has the same loss and gradients as without it, and as without our kernels."""
    gradients = []
    for triton, checkpointing in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = SdPNet(
            create_model_options("sdpnet_tiny", 3, dim=8, conv_blocks=1, transformer_blocks=1, kernel_size=3)
        )
        model.conv_blocks[0].triton = triton
        model.checkpointing = checkpointing
        model(torch.randn(2, 3, 32, 24)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for found, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
