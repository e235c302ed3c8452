"""Float8 by torchao in the transformer blocks; products are emulated on CPUs. The choice, and what stays as it is."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sdpnet.config.options import EmaOptions, TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants import choice, fp8
from sdpnet.execution.variants.choice import Measured, race
from sdpnet.execution.variants.fp8 import RECIPES, choose_fp8, fp8_variants, to_float8
from sdpnet.model.sdpnet import SdPNet, create_model
from sdpnet.optim.ema import ModelEma
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

CPU = torch.device("cpu")
ALONE = Processes(ShardOptions(), CPU)
ON_GPU = Processes(ShardOptions(), torch.device("cuda", 0))
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
LAYERS = ("qkv", "proj", "mlp.0", "mlp.3")


def small(**options: Any) -> SdPNet:
    torch.manual_seed(0)
    return create_model("sdpnet_tiny", 10, dim=32, conv_blocks=1, **options)


def in_float8(model: SdPNet, recipe: str = "tensorwise") -> SdPNet:
    model = copy.deepcopy(model)
    for block in model.transformer_blocks:
        to_float8(block, recipe, emulate=True)
    return model


@needs_torchao
def test_parameters_and_evaluation_stay() -> None:
    plain = small()
    model = in_float8(plain)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(model.state_dict()) == list(plain.state_dict())
    names = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert names == [f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in LAYERS]
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), plain(x))
    assert torch.equal(model.eval()(x), plain.eval()(x))
    plain.load_state_dict(model.state_dict())
    average = ModelEma(small(), EmaOptions(0.5))
    average.update(model)
    assert "Float8Linear" not in {type(module).__name__ for module in average.module.modules()}
    again = copy.deepcopy(model).train()
    assert torch.equal(again(x), model.train()(x))


def losses(model: SdPNet, steps: int) -> torch.Tensor:
    """In float32, because bfloat16 takes minutes on some CPUs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 10
    values = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values)


@needs_torchao
@pytest.mark.parametrize("recipe", [RECIPES[0], pytest.param(RECIPES[1], marks=pytest.mark.slow)])
def test_losses_beside_those_without_float8(recipe: str) -> None:
    """The model learns 20 images by heart, in float8 as without it."""
    expected, found = losses(small(), 50), losses(in_float8(small(), recipe), 50)
    assert not torch.equal(found, expected)
    assert expected[-1] < 0.5 * expected[0]
    assert (found[:20] - expected[:20]).abs().max() < 0.05
    assert (found - expected).abs().max() < 0.2
    assert abs(found[-10:].mean() - expected[-10:].mean()) < 0.1


@needs_torchao
def test_blocks_are_compiled_and_recomputed() -> None:
    """In one graph, and with activation checkpointing."""
    model = in_float8(small())
    block, x = model.transformer_blocks[0], torch.randn(2, 5, 32)
    expected = block(x)
    compiled = copy.deepcopy(block)
    compiled.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        model(torch.ones(2, 3, 32, 32)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


@needs_torchao
def test_the_race_takes_float8_for_equal() -> None:
    variants = fp8_variants(TrainOptions(), small(dropout=0.5), 2, 32, torch.bfloat16, CPU, emulate=True)
    measured = race(variants, CPU, rounds=1)
    assert list(measured) == ["off", *RECIPES] and not any(row.reason for row in measured.values())
    assert all(0.01 < measured[recipe].difference < 0.2 for recipe in RECIPES)


def test_off_and_a_cpu() -> None:
    model = small()
    before = [type(module) for module in model.modules()]
    for asked in ("off", "auto"):
        assert choose_fp8(TrainOptions(fp8=asked), model, 2, 32, torch.bfloat16, ALONE) == []  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^train\.fp8 = 'rowwise': needs an NVIDIA GPU$"):
        choose_fp8(TrainOptions(fp8="rowwise"), model, 2, 32, torch.bfloat16, ALONE)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "installed", "reason"),
    [
        ((8, 6), torch.bfloat16, 32, True, "needs a GPU of compute capability 8.9 or more"),
        ((9, 0), torch.float16, 32, True, "needs train.amp = bf16"),
        ((9, 0), torch.bfloat16, 24, True, "needs a model.dim that is a multiple of 16"),
        ((9, 0), torch.bfloat16, 32, False, "needs torchao (nowhere): pip install 'sdpnet[fp8]'"),
    ],
)
def test_auto_says_why_it_is_off(
    capability: tuple[int, int],
    dtype: torch.dtype,
    dim: int,
    installed: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def torchao() -> None:
        if not installed:
            raise UserError("needs torchao (nowhere): pip install 'sdpnet[fp8]'")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp8, "_torchao", torchao)
    model = create_model("sdpnet_tiny", 3, dim=dim)
    assert choose_fp8(TrainOptions(fp8="auto"), model, 2, 32, dtype, ON_GPU) == [f"fp8: off; {reason}"]


def test_the_fastest_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(fp8, "_reason", lambda *_: "")
    rows = {"off": Measured([0.004]), "tensorwise": Measured([0.003]), "rowwise": Measured([0.005])}
    monkeypatch.setattr(choice, "race", lambda variants, device: rows)
    converted: list[str] = []
    monkeypatch.setattr(fp8, "to_float8", lambda block, recipe: converted.append(recipe))
    notes = choose_fp8(TrainOptions(fp8="auto"), small(), 2, 32, torch.bfloat16, ON_GPU)
    assert notes == ["fp8: tensorwise; off 4.00 ms, tensorwise 3.00 ms, rowwise 5.00 ms"]
    assert converted == ["tensorwise"] * 2


@needs_torchao
@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with float8"
)
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled: bool) -> None:
    device = torch.device("cuda", 0)
    model = create_model("sdpnet_xl", conv_blocks=1, transformer_blocks=1).to(device)
    options = TrainOptions(compile=compiled)
    measured = race(fp8_variants(options, model, 64, 224, torch.bfloat16, device), device, rounds=1)
    assert not any(row.reason for row in measured.values()), measured
