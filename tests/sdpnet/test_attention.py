from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from triton_programs import needs_interpreter, needs_triton, run

from sdpnet.config.load import load_config
from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants import choice
from sdpnet.execution.variants.attention import attention_variants, choose_attention
from sdpnet.execution.variants.choice import Measured, race
from sdpnet.model.kernels import attention as kernels
from sdpnet.model.kernels.attention import attention, takes
from sdpnet.model.sdpnet import SdPNet, create_model_options
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

ALONE = Processes(ShardOptions(), torch.device("cpu"))


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    "tests",
    [
        "(equals and (5-2-32 or 17-3-48)) or transformer_block",
        pytest.param("equals or agree", marks=pytest.mark.slow),
        pytest.param("half or large or views or without or fault", marks=pytest.mark.slow),
        pytest.param("autocast or compiled or recomputed", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(tests: str) -> None:
    pytest_options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-k", tests)
    run("-m", "pytest", *pytest_options, "tests/support/attention_in_interpreter.py", TRITON_INTERPRET="1")


COMPILE = """
import sys
from kernel_compilation import compiled_for, resources
import torch
from sdpnet.model.kernels import attention
from sdpnet.model.kernels.attention_kernel import attention_forward_kernel, attention_key_kernel, attention_query_kernel
capability, dtype, tokens, heads, width = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
attention._has_tensor_memory = lambda device: capability == 100
shared_memory = {80: 163, 90: 227, 100: 227}[capability] << 10
types = dict.fromkeys(("qkv", "gradient", "out", "grad_qkv"), dtype) | dict.fromkeys(("lse", "delta"), "*fp32")
forward = attention._FORWARD if width <= 48 else attention._FORWARD_WIDE
for kernel, tiling, words in (
    (attention_forward_kernel, forward, dict(TRAINING=True)),
    (attention_forward_kernel, forward, dict(TRAINING=False)),
    (attention_query_kernel, attention._QUERIES, {}),
    (attention_key_kernel, attention._KEYS, {}),
):
    _, static = attention._constants(tiling, torch.empty(1, tokens, 3, heads, width, device="meta"))
    static |= words
    options = {name: static.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in static}
    compiled = compiled_for(capability, kernel, static, types, options, other="fp32")
    assert compiled.metadata.shared <= shared_memory, compiled.metadata.shared
    assert "trap" not in compiled.asm["ptx"]
    assert ("wgmma" in compiled.asm["ptx"]) == (capability == 90 and tokens > 64 and tiling.rows == 64)
    usage = resources(compiled, sys.argv[6])
    if capability == 90:
        assert "STACK:0" in usage and "LOCAL:0" in usage, usage  # registers hold everything
    print(kernel.__name__, words, compiled.metadata.shared, *(word for word in usage if word.startswith("REG:")))
"""


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "tokens", "heads", "width"),
    [
        (90, "*bf16", 201, 16, 48),
        pytest.param(90, "*fp16", 201, 12, 64, marks=pytest.mark.slow),
        pytest.param(90, "*bf16", 256, 4, 64, marks=pytest.mark.slow),
        pytest.param(90, "*bf16", 1, 1, 8, marks=pytest.mark.slow),
        pytest.param(80, "*bf16", 201, 16, 48, marks=pytest.mark.slow),
        pytest.param(80, "*fp16", 256, 4, 64, marks=pytest.mark.slow),
        pytest.param(100, "*bf16", 201, 16, 48, marks=pytest.mark.slow),
        pytest.param(100, "*bf16", 256, 4, 64, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_gpus_that_are_not_here(
    capability: int, dtype: str, tokens: int, heads: int, width: int, tmp_path: Path
) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run("-c", COMPILE, *map(str, (capability, dtype, tokens, heads, width, tmp_path)), **environment)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on = kernels.runs_on.__wrapped__  # without its memory
    gpu, memory = torch.device("cuda", 0), SimpleNamespace(shared_memory_per_block_optin=163 << 10)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(kernels, "_kernels", lambda: object())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert runs_on(gpu) == expected
    memory.shared_memory_per_block_optin = 99 << 10  # of a card for games
    assert not runs_on(gpu)
    memory.shared_memory_per_block_optin = 227 << 10
    assert not runs_on(torch.device("cpu"))
    monkeypatch.setattr(kernels, "_kernels", lambda: None)
    assert not runs_on(gpu)


def test_what_it_takes() -> None:
    assert takes(256, 64, torch.bfloat16) and takes(1, 8, torch.float16)
    assert not takes(257, 64, torch.bfloat16) and not takes(201, 72, torch.bfloat16)
    assert not takes(201, 4, torch.bfloat16) and not takes(201, 64, torch.float32)


def chosen(attention: str, processes: Processes = ALONE, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, list[str]]:
    model = SdPNet(create_model_options("sdpnet_tiny", num_classes=3))
    names, state = list(model.state_dict()), torch.get_rng_state()
    options = TrainOptions(attention=attention, compile=False)  # type: ignore[arg-type]
    notes = choose_attention(options, model, 4, 32, dtype, processes)
    assert list(model.state_dict()) == names and torch.equal(torch.get_rng_state(), state)
    (both_blocks,) = {block.triton for block in model.transformer_blocks}
    return both_blocks, notes


def test_on_a_cpu() -> None:
    assert chosen("auto") == (False, []) and chosen("torch") == (False, [])
    with pytest.raises(UserError, match=r"^train.attention = 'triton': needs Triton and an NVIDIA GPU .*; use auto or"):
        chosen("triton")


@pytest.mark.parametrize(("seconds", "expected"), [((0.002, 0.001), True), ((0.001, 0.002), False)])
def test_the_faster_one(
    seconds: tuple[float, float], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(choice, "_same_generators", lambda device: torch.random.fork_rng(devices=[]))
    times = {name: Measured([value]) for name, value in zip(("torch", "triton"), seconds, strict=True)}
    monkeypatch.setattr(choice, "race", lambda variants, device: times)
    gpu = Processes(ShardOptions(), torch.device("cuda", 0))
    found, notes = chosen("auto", gpu)
    assert found is expected
    assert notes == [f"attention: {'triton' if expected else 'torch'}; torch {seconds[0] * 1e3:.2f} ms, "
                     f"triton {seconds[1] * 1e3:.2f} ms"]  # fmt: skip


def test_the_kernel_is_not_chosen_for_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdpnet.execution.variants.attention.runs_on", lambda device: True)
    with pytest.raises(UserError, match=r"^train.attention = 'triton': needs bf16 or fp16, .*, not torch.float32, 21 "):
        chosen("triton", dtype=torch.float32)


def test_torchs_pass_alone() -> None:
    """The result of all tokens and the packed gradient; equal again."""
    options = create_model_options("sdpnet_tiny", num_classes=3, dim=32, heads=2)
    variants = attention_variants(options, 2, 32, torch.bfloat16, ALONE.device)
    first, second = (variants.make["torch"]()() for _ in range(2))
    assert [tuple(value.shape) for value in first] == [(2, 21, 32), (2, 21, 3, 2, 16)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    measured = race(variants, ALONE.device, rounds=2)
    assert len(measured["torch"].seconds) == 2 and measured["triton"].reason.startswith("needs Triton")


@pytest.mark.parametrize("value", ["auto", "torch", "triton"])
def test_the_config_key(value: str) -> None:
    assert load_config("debug", [f"train.attention={value}"]).train.attention == value


def test_a_wrong_value_of_the_config_key() -> None:
    with pytest.raises(UserError, match=r"train\.attention"):
        load_config("debug", ["train.attention=flash"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(201, 16, 48), (201, 12, 64), (256, 2, 32), (17, 1, 16)])
def test_agrees_with_pytorch_on_a_gpu(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """The results are at most a little farther from float64's than PyTorch's; equal inputs give equal bits."""
    device = torch.device("cuda")
    if not kernels.runs_on(device):
        pytest.skip("needs Triton and a GPU of compute capability 8.0 or more with 160 KB of shared memory")
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(16, tokens, 3, heads, width, device=device, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(16, tokens, heads * width, device=device, generator=generator).to(dtype)

    def torchs(value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*value.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    def found(compute, qkv: torch.Tensor) -> list[torch.Tensor]:
        out = compute(qkv)
        return [out.detach(), torch.autograd.grad(out, qkv, gradient.to(out.dtype))[0]]

    exact = found(torchs, qkv.detach().double().requires_grad_())
    ours, again, theirs = found(attention, qkv), found(attention, qkv), found(torchs, qkv)
    for one, other, torch_one, expected in zip(ours, again, theirs, exact, strict=True):
        assert torch.equal(one, other)
        scale = expected.norm()
        assert (one.double() - expected).norm() / scale <= 1.5 * (torch_one.double() - expected).norm() / scale + 1e-4
