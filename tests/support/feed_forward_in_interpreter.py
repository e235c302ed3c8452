"""Tests of the feed-forward kernels in Triton's interpreter, which is on or off for a whole process.

tests/sdpnet/test_feed_forward.py runs this file. The oracle is PyTorch's GELU in float64, with the masks of
`sdpnet.model.dropout`. The interpreter truncates to bfloat16 instead of rounding.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch.nn import functional as F

from sdpnet.execution.variants import mlp
from sdpnet.execution.variants.choice import race
from sdpnet.model.dropout import draw_keys, dropped, split_keys, threshold
from sdpnet.model.feed_forward import FeedForward
from sdpnet.model.kernels import feed_forward
from sdpnet.model.kernels.feed_forward import BackwardShape, Shape, gelu_dropout
from sdpnet.model.sdpnet import ModelOptions, SdPNet, create_model_options

assert os.environ["TRITON_INTERPRET"] == "1"
Tensors = tuple[torch.Tensor, ...]


def compare(rows: int, width: int, rate: float, dtype: torch.dtype = torch.float32, tolerance: float = 1e-6) -> None:
    """Requires the results and gradients of float64, within `tolerance` of each tensor's largest value."""
    torch.manual_seed(rows * width)
    hidden, gradient = (torch.randn(2, rows, width) * 2).to(dtype)
    bias = torch.randn(width)
    row_keys, column_keys = split_keys(draw_keys(1, rows, width, hidden.device)[0, 0], rows, width)
    mask = (row_keys, column_keys, threshold(rate), 1 / (1 - rate)) if rate else ()
    inputs = hidden.requires_grad_(), bias.requires_grad_()
    out = gelu_dropout(*inputs, *mask)
    found = out, *torch.autograd.grad(out, inputs, gradient)
    exact = tuple(value.detach().double().requires_grad_() for value in inputs)
    plain = F.gelu(exact[0] + exact[1])
    if rate:
        plain = plain.masked_fill(dropped(row_keys, column_keys, rate), 0) / (1 - rate)
    expected = plain, *torch.autograd.grad(plain, exact, gradient.double())
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ((ours.double() - theirs).abs() <= tolerance * theirs.abs().max().clamp(min=1)).all()


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(("rows", "width"), [(5, 256), (3, 40), (1, 300), (7, 1536)])
def test_equals_pytorch_in_float64(rows: int, width: int, rate: float) -> None:
    compare(rows, width, rate)


@pytest.mark.parametrize(("at_once", "programs"), [(1, 1), (2, 3), (2, 4), (4, 1000)])
def test_programs_of_many_and_of_few_rows(at_once: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "_FORWARD", Shape(at_once))
    monkeypatch.setattr(feed_forward, "_BACKWARD", BackwardShape(at_once, programs=programs))
    compare(9, 512, 0.3)
    compare(9, 2048, 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded(dtype: torch.dtype) -> None:
    compare(6, 256, 0.2, dtype, 2 * torch.finfo(dtype).eps)


def test_gelu_far_from_zero() -> None:
    x = torch.linspace(-14, 14, 256).reshape(1, 256).requires_grad_()
    out = gelu_dropout(x, torch.zeros(256))
    (slope,) = torch.autograd.grad(out.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    assert ((out - expected).abs() <= 4e-7 * exact.abs().clamp(min=1)).all()
    assert ((slope - expected_slope).abs() <= 1e-6).all()


def test_no_rows() -> None:
    hidden, bias = torch.zeros(0, 256, requires_grad=True), torch.zeros(256, requires_grad=True)
    gelu_dropout(hidden, bias).sum().backward()
    assert bias.grad is not None and not bias.grad.any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's copies
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_torch_finds_no_fault_with_the_operations(rate: float) -> None:
    hidden, bias = torch.randn(2, 3, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    keys = split_keys(draw_keys(1, 6, 256, hidden.device)[0, 0].clone(), 6, 256)
    row_keys, column_keys = (key.clone() if rate else key[:0].clone() for key in keys)
    arguments = (bias, row_keys, column_keys, threshold(rate), 1 / (1 - rate))
    torch.library.opcheck(torch.ops.sdpnet.gelu_dropout, (hidden, *arguments))
    detached = (torch.randn(2, 3, 256), hidden.detach(), bias.detach(), *arguments[1:])
    torch.library.opcheck(torch.ops.sdpnet.gelu_dropout_backward, detached)


def modules(rate: float) -> tuple[FeedForward, FeedForward, torch.Tensor, torch.Tensor]:
    """Two equal feed-forward parts, the second one with our kernel; an input and keys."""
    torch.manual_seed(0)
    plain = FeedForward(24, 96, rate)
    ours = copy.deepcopy(plain)
    ours.variant = "triton"
    return plain, ours, torch.randn(2, 5, 24), draw_keys(1, 10, 96, torch.device("cpu"))[0]


def assert_same_step(
    plain: torch.nn.Module, ours: torch.nn.Module, x: torch.Tensor, keys: torch.Tensor, tolerance: float
) -> None:
    outs, gradients = [], []
    for module in (plain, ours):
        image = x.clone().requires_grad_()
        out = module(image, keys)
        (out.float() * torch.arange(out.numel()).reshape(out.shape).sin()).sum().backward()
        outs.append(out)
        gradients.append([image.grad, *(parameter.grad for parameter in module.parameters())])
    assert outs[0].dtype == outs[1].dtype
    torch.testing.assert_close(outs[1], outs[0], atol=tolerance, rtol=tolerance)
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=20 * tolerance, rtol=20 * tolerance)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_feed_forward(rate: float) -> None:
    plain, ours, x, keys = modules(rate)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same_step(plain, ours, x, keys, 1e-5)
    assert torch.equal(plain.eval()(x), ours.eval()(x))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_autocast(rate: float) -> None:
    plain, ours, x, keys = modules(rate)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(plain, ours, x, keys, 0.02)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_compiled_in_one_graph(rate: float) -> None:
    plain, ours, x, keys = modules(rate)
    assert_same_step(plain, torch.compile(ours, backend="aot_eager", fullgraph=True), x, keys, 1e-5)


def test_recomputed_activations() -> None:
    """The model with checkpointing has the same gradients as without it, and as without our kernel."""
    gradients = []
    for variant, checkpointing in (("torch", False), ("triton", False), ("triton", True)):
        torch.manual_seed(0)
        options = create_model_options(
            "sdpnet_tiny", 3, dim=8, conv_blocks=1, transformer_blocks=2, kernel_size=3, dropout=0.3
        )
        model = SdPNet(options)
        for block in model.transformer_blocks:
            block.mlp.variant = variant
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        model(torch.randn(2, 3, 32, 24)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for found, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_choice_finds_that_they_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "runs_on", lambda device: True)
    options = ModelOptions(dim=16, heads=2, dropout=0.2)
    variants = mlp.mlp_variants(options, 2, 32, dtype, torch.device("cpu"), compiled=False)
    measured = race(variants, torch.device("cpu"), rounds=1)
    assert measured["triton"].seconds and not measured["triton"].reason
    assert 0 < measured["triton"].difference < 0.01
