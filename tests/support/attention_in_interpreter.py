"""Tests of the attention kernels in Triton's interpreter, which is on or off for a whole process.

tests/sdpnet/test_attention.py runs this file. The oracle is attention in float64. The interpreter multiplies matrices
of float32 and float16, but not of bfloat16.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch

from sdpnet.model.kernels import attention as kernels
from sdpnet.model.kernels.attention import Tiling, attention
from sdpnet.model.positions import rotary_embedding
from sdpnet.model.sdpnet import SdPNet, TransformerBlock, create_model_options

assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.fixture(autouse=True)
def with_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets blocks use the kernels in float32, whose products are exact here."""
    monkeypatch.setattr(kernels, "_DTYPES", (torch.float32, torch.float16))


def inputs_of(
    batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv, with scores that make some weights large, and a gradient of the result."""
    generator = torch.Generator().manual_seed(tokens * width + heads)
    qkv = 2 * torch.randn(batch, tokens, 3, heads, width, generator=generator)
    gradient = torch.randn(batch, tokens, heads * width, generator=generator)
    return qkv.to(dtype).requires_grad_(), gradient.to(dtype)


def in_float64(qkv: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the gradient to qkv."""
    qkv = qkv.detach().double().requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = ((q @ k.transpose(-1, -2)) / qkv.shape[-1] ** 0.5).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, qkv, gradient.double())[0]


def ours(qkv: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = attention(qkv)
    return out.detach(), torch.autograd.grad(out, qkv, gradient)[0]


def assert_close(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], tolerance: float
) -> None:
    """Requires that differences are within `tolerance`, relative to the largest expected value of each tensor."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ((ours.double() - theirs).abs() <= tolerance * theirs.abs().max()).all()


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [
        (1, 5, 2, 32),
        (2, 1, 1, 16),
        (2, 17, 3, 48),  # one row in the second tile
        (1, 16, 16, 16),
        (1, 33, 1, 8),  # narrower than the narrowest product
        (1, 40, 2, 24),  # 16 channels and 8
        (1, 75, 1, 64),
        (1, 256, 1, 48),
    ],
)
def test_equals_float64(batch: int, tokens: int, heads: int, width: int) -> None:
    inputs = inputs_of(batch, tokens, heads, width)
    assert_close(ours(*inputs), in_float64(*inputs), 4e-6)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("chunk", [16, 32])
def test_tilings_agree(rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to divide the work, among them those that are not used by default."""
    for name in ("_FORWARD", "_QUERIES", "_KEYS"):
        monkeypatch.setattr(kernels, name, Tiling(rows=rows, chunk=chunk))
    inputs = inputs_of(1, 39, 2, 48)
    assert_close(ours(*inputs), in_float64(*inputs), 4e-6)


def test_half_precision() -> None:
    """As exact as weights and gradients of scores are that are rounded for the products."""
    inputs = inputs_of(1, 20, 2, 48, torch.float16)
    found = ours(*inputs)
    assert [value.dtype for value in found] == [torch.float16] * 2
    assert_close(found, in_float64(*inputs), 2e-3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of keys that do not exist
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_large_scores() -> None:
    """A softmax that is nearly one-hot, and logarithms of sums far below and above 0."""
    for sign in (1.0, -1.0):
        qkv, gradient = inputs_of(1, 21, 1, 16)
        with torch.no_grad():
            qkv[:, :, :2] = 20 + qkv[:, :, :2]
            qkv[:, :, 0] *= sign
        assert_close(ours(qkv, gradient), in_float64(qkv, gradient), 1e-4)


def test_inputs_and_gradients_that_are_views() -> None:
    qkv, gradient = inputs_of(2, 9, 2, 16)
    expected = ours(qkv, gradient)
    view = qkv.detach().permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0).requires_grad_()
    found = ours(view, gradient.transpose(0, 1).contiguous().transpose(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    of_sum = torch.autograd.grad(attention(qkv).sum(), qkv)[0]
    assert_close((of_sum, of_sum), (in_float64(qkv, torch.ones_like(gradient))[1],) * 2, 4e-6)


def test_without_gradients_nothing_is_kept() -> None:
    qkv, gradient = inputs_of(1, 9, 2, 16)
    with torch.no_grad():
        out = attention(qkv)
    assert torch.equal(out, ours(qkv, gradient)[0])
    assert torch.ops.sdpnet.attention(qkv.detach(), False)[1].numel() == 0
    assert attention(qkv[:0]).shape == (0, 9, 32)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_finds_no_fault_with_the_operations(dtype: torch.dtype) -> None:
    qkv, gradient = inputs_of(2, 9, 2, 16, dtype)
    tolerances = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.float16 else {}
    for training in (True, False):
        torch.library.opcheck(torch.ops.sdpnet.attention, (qkv if training else qkv.detach(), training), **tolerances)
    out, lse = torch.ops.sdpnet.attention(qkv.detach(), True)
    torch.library.opcheck(torch.ops.sdpnet.attention_backward, (gradient, qkv.detach(), out, lse), **tolerances)


def blocks() -> tuple[TransformerBlock, TransformerBlock, torch.Tensor]:
    """Two equal blocks, the second one with our kernels, and an input of 3 + 2 x 3 tokens."""
    torch.manual_seed(0)
    plain = TransformerBlock(create_model_options("sdpnet_tiny", 3, dim=48, heads=2), 0.0)
    fused = copy.deepcopy(plain)
    fused.triton = True
    return plain, fused, torch.randn(2, 9, 48)


def assert_same_step(
    plain: TransformerBlock,
    fused: torch.nn.Module,
    x: torch.Tensor,
    tolerance: float,
    rotary: torch.Tensor | None = None,
) -> None:
    outs, gradients = [], []
    for block in (plain, fused):
        block.zero_grad()
        tokens = x.clone().requires_grad_()
        out = block(tokens, rotary)
        (out.float() * torch.arange(out.numel()).reshape(out.shape).sin()).sum().backward()
        outs.append(out)
        gradients.append([tokens.grad, *(parameter.grad for parameter in block.parameters())])
    assert outs[0].dtype == outs[1].dtype
    torch.testing.assert_close(outs[1], outs[0], atol=tolerance, rtol=tolerance)
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=20 * tolerance, rtol=20 * tolerance)


def test_transformer_block(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused, x = blocks()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same_step(plain, fused, x, 1e-5)
    assert_same_step(plain, fused, x, 1e-5, rotary_embedding((2, 3), 3, 24, x.device, torch.float32))
    monkeypatch.setattr(kernels, "_forward", None)
    assert_same_step(plain, fused, torch.randn(1, 257, 48), 1e-9)  # more tokens than the kernel takes


def test_autocast() -> None:
    plain, fused, x = blocks()
    with torch.autocast("cpu", torch.float16):
        assert_same_step(plain, fused, x, 0.01)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic: bool) -> None:
    plain, fused, x = blocks()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_same_step(plain, compiled, x, 1e-5)
    assert_same_step(plain, compiled, x, 1e-5, rotary_embedding((2, 3), 3, 24, x.device, torch.float32))


def test_recomputed_activations() -> None:
    """The model with checkpointing has the same loss and gradients as without it, and as without our kernels."""
    gradients = []
    for triton, checkpointing in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = SdPNet(create_model_options("sdpnet_tiny", 3, dim=32, heads=2, conv_blocks=1, transformer_blocks=1))
        model.transformer_blocks[0].triton = triton
        model.checkpointing = checkpointing
        model(torch.randn(2, 3, 16, 24)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for found, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
