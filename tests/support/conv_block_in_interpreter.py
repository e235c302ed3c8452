"""Tests of the fused conv block in Triton's interpreter, which is on or off for a whole process.

tests/sdpnet/test_conv_block.py runs this file. The oracle is the plain block, in float64 where rounding matters. The
interpreter truncates to bfloat16 instead of rounding.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sdpnet.execution.sync_norm import synchronize_batch_norm
from sdpnet.model.kernels import batch_norm, conv_block
from sdpnet.model.sdpnet import ConvBlock, SdPNet, create_model_options

assert os.environ["TRITON_INTERPRET"] == "1"


def blocks(dim: int = 6, *, kernel: int = 3, drop_path: float = 0.0) -> tuple[ConvBlock, ConvBlock]:
    """Two equal blocks, the second one fused. Their batch norms are not at their initial values."""
    torch.manual_seed(0)
    plain = ConvBlock(dim, kernel, drop_path)
    for norm in (plain.norm1, plain.norm2):
        for values in (norm.weight, norm.running_var):
            nn.init.uniform_(values, 0.5, 2)
        for values in (norm.bias, norm.running_mean):
            nn.init.normal_(values)
    fused = copy.deepcopy(plain)
    fused.fused = True
    return plain, fused


def image(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)


def a_step(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The result, all gradients and all buffers after a training pass."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = block(x)
    # The gradient is far from zero in its mean, as are the gradients that batch norm's backward pass takes sums of.
    upstream = (torch.arange(out.numel(), dtype=torch.float64) * 0.7).sin().add(0.3).view(out.shape)
    (out.double() * upstream).sum().backward()
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients, **dict(block.named_buffers())}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Requires that differences are within `tolerance`, relative to the largest expected value of each tensor.

    Gradients that are 0 but for rounding, as that of a bias before a batch norm, need not agree.
    """
    for (name, ours), theirs in zip(found.items(), expected.values(), strict=True):
        assert ours.shape == theirs.shape
        difference = (ours.double() - theirs.double()).abs().max()
        assert difference <= tolerance * theirs.double().abs().max().clamp(min=1e-9), (
            name,
            difference,
            theirs.abs().max(),
        )


@pytest.mark.parametrize(
    ("shape", "kernel", "drop_path"),
    [
        ((3, 6, 4, 5), 3, 0.4),
        ((1, 3, 1, 4), 3, 0.0),
        ((2, 130, 2, 3), 5, 0.5),  # a second block of channels, which is not full
        ((5, 5, 7, 4), 7, 0.0),
    ],
)
def test_equals_the_plain_block_in_float64(shape: tuple[int, ...], kernel: int, drop_path: float) -> None:
    plain, fused = blocks(shape[1], kernel=kernel, drop_path=drop_path)
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = image(*shape)
    found, expected = a_step(fused, x), a_step(plain.double(), x.double())
    assert_same(found, expected, 2e-5)
    assert found["norm1.num_batches_tracked"] == 1
    for name, dtype in (("out", torch.float32), ("norm1.running_var", torch.float32)):
        assert found[name].dtype == dtype


@pytest.mark.parametrize(("rows", "channels", "programs"), [(2, 16, 1), (4, 4, 10), (8, 128, 10000)])
def test_tiles_and_programs_meet(rows: int, channels: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "_ROWS", rows)
    monkeypatch.setattr(batch_norm, "_CHANNELS", channels)
    monkeypatch.setattr(batch_norm, "_PROGRAMS", programs)
    monkeypatch.setattr(batch_norm, "_FINISHED", {"PROGRAMS": 4, "CHANNELS": 4})
    plain, fused = blocks()
    x = image(3, 6, 4, 5)
    assert_same(a_step(fused, x), a_step(plain.double(), x.double()), 5e-5)


def test_a_mean_that_is_large_beside_the_deviation() -> None:
    """Sums of squares without a shift would lose all digits of a variance of 1e-4 beside a mean of 1,000."""
    values = 1000 + 0.01 * image(4, 3, 5, 5)
    statistics = torch.empty(3, 3)
    batch_norm.write_statistics(values, statistics, 1e-5, gelu=False)
    exact = values.double().permute(1, 0, 2, 3).flatten(1)
    variance = exact.var(dim=1, correction=0)
    torch.testing.assert_close(statistics[0].double(), exact.mean(dim=1), rtol=1e-7, atol=0)
    torch.testing.assert_close(statistics[2].double(), variance, rtol=1e-4, atol=0)
    torch.testing.assert_close(statistics[1].double(), (variance + 1e-5).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    plain, fused = blocks(8, drop_path=0.3)
    x = image(4, 8, 5, 5)
    with torch.autocast("cpu", dtype):
        found, expected = a_step(fused, x.to(dtype)), a_step(plain, x.to(dtype))
    assert [value.dtype for value in found.values()] == [value.dtype for value in expected.values()]
    assert_same(found, expected, 30 * torch.finfo(dtype).eps)


def test_equal_inputs_give_equal_bits() -> None:
    first, second = (a_step(blocks(drop_path=0.3)[1], image(3, 6, 4, 5)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_layouts() -> None:
    _, fused = blocks()
    other = copy.deepcopy(fused).to(memory_format=torch.channels_last)
    x = image(2, 6, 4, 5)
    assert_same(a_step(other, x.contiguous()), a_step(fused, x), 1e-6)
    assert other(x.contiguous()).is_contiguous(memory_format=torch.channels_last)
    assert other.pointwise.weight.grad.stride() == other.pointwise.weight.stride()


def test_evaluation_is_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_block, "fused_conv_block", None)
    plain, fused = blocks()
    x = image(2, 6, 4, 5)
    with torch.no_grad():
        assert torch.equal(fused(x), plain(x))
    assert torch.equal(fused.eval()(x), plain.eval()(x))
    fused.train().norm1.eval()  # as where a fine-tuning freezes it
    fused(x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused.train()(image(1, 6, 1, 1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's copies
def test_torch_finds_no_fault_with_the_operations() -> None:
    _, block = blocks()
    x, factor = image(2, 6, 4, 5), torch.tensor([0.0, 2.0])
    parameters = [p for m in (block.depthwise, block.norm1, block.pointwise, block.norm2) for p in (m.weight, m.bias)]
    inputs = [x.clone().requires_grad_(), factor, *parameters, 1e-5, 1e-5]
    torch.library.opcheck(torch.ops.sdpnet.conv_block, inputs)
    plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
    _, *kept = torch.ops.sdpnet.conv_block(*plain)
    weights = [plain[2], plain[4], plain[6], plain[8]]
    torch.library.opcheck(torch.ops.sdpnet.conv_block_backward, [torch.ones_like(x), x, factor, *weights, *kept])


def test_compiled_in_one_graph() -> None:
    plain, fused = blocks(drop_path=0.3)
    x = image(3, 6, 4, 5)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    found, expected = a_step(compiled, x), a_step(plain, x)
    assert_same(dict(zip(expected, found.values(), strict=True)), expected, 1e-5)


def test_synchronized_norms_are_the_plain_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_block, "fused_conv_block", None)
    plain, fused = blocks()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        x = image(2, 6, 4, 5)
        assert_same(a_step(synchronize_batch_norm(fused, torch.device("cpu")), x), a_step(plain, x), 1e-5)
    finally:
        dist.destroy_process_group()


def test_distributed(tmp_path: Path) -> None:
    plain, fused = blocks()
    fused.to(memory_format=torch.channels_last)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        x = image(2, 6, 4, 5)
        found = a_step(DistributedDataParallel(fused, gradient_as_bucket_view=True), x)
        expected = a_step(plain, x)
        assert_same(dict(zip(expected, found.values(), strict=True)), expected, 1e-5)
    finally:
        dist.destroy_process_group()


def test_recomputed_activations() -> None:
    """Gradients and running statistics are the same with and without checkpointing, and those of the plain model."""
    results = []
    for fused, checkpointing in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = SdPNet(
            create_model_options("sdpnet_tiny", 3, dim=8, conv_blocks=2, transformer_blocks=1, drop_path=0.3)
        )
        for block in model.conv_blocks:
            block.fused = fused
        model.checkpointing = checkpointing
        model(image(2, 3, 32, 24)).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({**gradients, **dict(model.named_buffers())})
    for other in results[1:]:
        assert_same(other, results[0], 1e-3)
