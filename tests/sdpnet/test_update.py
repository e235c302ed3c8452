"""PyTorch's and our update of weights and average: equal results, and the choice between them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from triton_programs import needs_interpreter, needs_triton, run

from sdpnet.config.load import load_config
from sdpnet.config.options import EmaOptions, OptimOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants import choice, update
from sdpnet.execution.variants.choice import Measured, Variants, race
from sdpnet.execution.variants.update import choose_update, update_variants
from sdpnet.model.sdpnet import create_model
from sdpnet.optim import fused_update
from sdpnet.optim.ema import ModelEma, _move
from sdpnet.optim.fused_update import TritonUpdate
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.optim.update import TorchUpdate
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

ALONE = Processes(ShardOptions(), torch.device("cpu"))
ON_GPU = Processes(ShardOptions(), torch.device("cuda", 0))


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    "tests",
    [
        "float64 or last_bit or do_not_take",
        pytest.param("bad_step or continues or without or missing", marks=pytest.mark.slow),
        pytest.param("whole_model", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(tests: str) -> None:
    pytest_options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", tests)
    run("-m", "pytest", *pytest_options, "tests/support/update_in_interpreter.py", TRITON_INTERPRET="1")


COMPILE = """
import sys
from kernel_compilation import compiled_for, resources
from sdpnet.optim.fused_update import LAUNCH
from sdpnet.optim.update_kernel import prepare_kernel, square_sum_kernel, update_kernel
blocks = {name: value for name, value in LAUNCH.items() if name != "num_warps"}
integers = "gradients", "sizes", "steps", "parameters", "firsts", "seconds", "averages"
types = {"chunks": "*i32", "numbers": "*fp64", "count": "i32"} | dict.fromkeys(integers, "*i64")
types |= dict.fromkeys(("partial", "rates", "bad", "clip_factor", "average_weight"), "*fp32")
for kernel, static, wide in (
    (update_kernel, dict(blocks, ADAMW=True, AVERAGE=True, ALIGNED=True), 18),
    (update_kernel, dict(blocks, ADAMW=True, AVERAGE=False, ALIGNED=False), 12),
    (update_kernel, dict(blocks, ADAMW=False, AVERAGE=True, ALIGNED=True), 6),
    (square_sum_kernel, dict(blocks, ALIGNED=True), 2),
    (prepare_kernel, dict(BLOCK=256), 0),
):
    options = {"num_warps": LAUNCH["num_warps"], "enable_fp_fusion": False}
    compiled = compiled_for(int(sys.argv[1]), kernel, static, types, options, other="fp32", aligned=False)
    assert compiled.asm["ptx"].count("v4.b32") == wide * LAUNCH["BLOCKS"]  # 16 bytes for each load and store
    usage = resources(compiled, sys.argv[2])
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage
    print(kernel.__name__, *(word for word in usage if word.startswith("REG:")))
"""


@needs_triton
@pytest.mark.parametrize(
    "capability",
    ["90", pytest.param("80", marks=pytest.mark.slow), pytest.param("100", marks=pytest.mark.slow)],
)
def test_compiles_for_gpus_that_are_not_here(capability: str, tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run("-c", COMPILE, capability, str(tmp_path), **environment)


def test_the_average_by_one_kernel_is_that_of_three_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs compute, on the CPU: PyTorch's fused SGD moves an average towards a value."""
    torch.manual_seed(0)
    averages, values = ([torch.randn(5, 3), torch.randn(7)] for _ in range(2))
    expected = [average.clone() for average in averages]
    weight = torch.tensor(0.3)
    _move(expected, values, weight)
    torch._fused_sgd_(
        averages,
        values,
        [],
        lr=weight,
        weight_decay=1.0,
        maximize=True,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        is_first_step=False,
    )
    for ours, theirs in zip(averages, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_cpu_has_pytorchs() -> None:
    config, model = load_config("debug"), create_model("sdpnet_tiny", 3)
    assert config.train.update == "auto"
    assert choose_update(config, model, ALONE) == ("torch", [])
    assert choose_update(load_config("debug", ["train.update=torch"]), model, ALONE) == ("torch", [])
    with pytest.raises(UserError, match=r"train\.update = 'triton': needs Triton and an NVIDIA GPU"):
        choose_update(load_config("debug", ["train.update=triton"]), model, ALONE)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_pass_returns_all_that_an_update_changes(name: str) -> None:
    """Two equal variants agree, and the model stays as it is."""
    model = create_model("sdpnet_tiny", 3, dim=16, conv_blocks=1, transformer_blocks=1)
    before = copy.deepcopy(model.state_dict())
    variants = update_variants(load_config("debug", [f"optim.name={name}", "ema.decay=0.9"]), model)
    assert list(variants.make) == ["torch", "triton"]
    measured = race(Variants("x", "", {"torch": variants.make["torch"], "same": variants.make["torch"]}), ALONE.device)
    assert measured["same"].difference == 0.0 and not measured["same"].reason
    assert len(variants.make["torch"]()()) >= 4 * len(list(model.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_faster_one_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(update, "runs_on", lambda device: True)
    rows = {"torch": Measured([0.002]), "triton": Measured([0.001])}
    monkeypatch.setattr(choice, "race", lambda variants, device: rows)
    name, notes = choose_update(load_config("debug"), create_model("sdpnet_tiny", 3), ON_GPU)
    assert (name, notes) == ("triton", ["update: triton; torch 2.00 ms, triton 1.00 ms"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_on_a_gpu(clip: float) -> None:
    device = torch.device("cuda", 0)
    if not fused_update.runs_on(device):
        pytest.skip("needs Triton and compute capability 8.0")
    torch.manual_seed(0)
    model: nn.Module = create_model("sdpnet_l").to(device).to(memory_format=torch.channels_last)
    results = []
    for update_type in (TorchUpdate, TritonUpdate):
        twin = copy.deepcopy(model)
        optimizer, ema = make_optimizer(twin, OptimOptions(layer_decay=0.8)), ModelEma(twin, EmaOptions(0.9))
        both = update_type(twin, optimizer, ema, clip)
        for seed in range(4):
            generator = torch.Generator(device).manual_seed(seed)
            for parameter in twin.parameters():
                parameter.grad = torch.empty_like(parameter).normal_(std=0.01, generator=generator)
            bad = torch.tensor(float(seed == 2), device=device)
            if seed == 2:
                next(twin.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
            norm = both.grad_norm()
            both.step(bad)
            both.average(bad)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        results.append([norm, *twin.state_dict().values(), *ema.module.state_dict().values(), *moments])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
