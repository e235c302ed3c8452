"""The feed-forward part of the transformer blocks: our kernels against PyTorch's operations, and the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_programs import needs_interpreter, needs_triton, run

from sdpnet.config.load import load_config
from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants import choice, mlp
from sdpnet.execution.variants.choice import Measured
from sdpnet.execution.variants.mlp import choose_mlp, mlp_variants
from sdpnet.model.feed_forward import FeedForward
from sdpnet.model.kernels import feed_forward
from sdpnet.model.sdpnet import ModelOptions, SdPNet, create_model
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

CPU = torch.device("cpu")


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    "tests",
    [
        "(float64 and 40) or far_from or test_feed_forward or choice or no_rows",
        pytest.param("(float64 and not 40) or programs or half_precision", marks=pytest.mark.slow),
        pytest.param("fault or autocast or compiled or recomputed", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(tests: str) -> None:
    pytest_options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-k", tests)
    run("-m", "pytest", *pytest_options, "tests/support/feed_forward_in_interpreter.py", TRITON_INTERPRET="1")


COMPILE = """
import sys
from kernel_compilation import compiled_for, resources
import torch
from sdpnet.model.kernels import feed_forward
from sdpnet.model.kernels.feed_forward_kernel import gelu_dropout_backward_kernel, gelu_dropout_kernel
capability, hidden, width, drops = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "drops"
types = {**dict.fromkeys(("hidden", "out", "gradient"), hidden), **dict.fromkeys(("bias", "partial"), "*fp32")}
types |= {**dict.fromkeys(("row_keys", "column_keys"), "*i32"), **dict.fromkeys(("scale", "log_scale"), "fp32")}
shapes = {gelu_dropout_kernel: feed_forward._FORWARD, gelu_dropout_backward_kernel: feed_forward._BACKWARD}
for kernel, shape in shapes.items():
    constants = feed_forward._constants(shape, torch.empty(1, width), torch.empty(int(drops)))
    options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": True}
    compiled = compiled_for(capability, kernel, constants, types, options)
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 8192 and "div." not in ptx
    assert not constants["EVEN"] or all("v4" in line for line in ptx.splitlines() if "st.global" in line)  # 16 bytes
    usage = resources(compiled, sys.argv[5])
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage  # registers hold everything
    print(kernel.__name__, *(word for word in usage if word.startswith("REG:")))
"""


@needs_triton
@pytest.mark.parametrize(
    ("capability", "hidden", "width", "drops"),
    [
        ("90", "*bf16", "3072", "drops"),
        pytest.param("90", "*bf16", "3072", "no", marks=pytest.mark.slow),
        pytest.param("80", "*fp16", "3072", "drops", marks=pytest.mark.slow),
        pytest.param("80", "*fp32", "256", "drops", marks=pytest.mark.slow),
        pytest.param("100", "*bf16", "3072", "drops", marks=pytest.mark.slow),
        pytest.param("90", "*bf16", "300", "drops", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_gpus_that_are_not_here(
    capability: str, hidden: str, width: str, drops: str, tmp_path: Path
) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run("-c", COMPILE, capability, hidden, width, drops, str(tmp_path), **environment)


def test_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(feed_forward, "_kernels", lambda: object())
    runs_on = feed_forward.runs_on.__wrapped__  # without its memory
    for capability, expected in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert runs_on(gpu) == expected
    assert not runs_on(CPU)


def model(**options: object) -> SdPNet:
    return create_model("sdpnet_tiny", 5, **options)


def chosen(asked: str, made: SdPNet, device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    options = TrainOptions(mlp=asked, compile=False)  # type: ignore[arg-type]
    return choose_mlp(options, made, 4, 64, dtype, Processes(ShardOptions(), device))


@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_a_cpu_has_pytorchs(asked: str) -> None:
    made = model()
    assert chosen(asked, made) == []
    assert {block.mlp.variant for block in made.transformer_blocks} == {"torch"}


def test_what_cannot_run_is_a_mistake() -> None:
    with pytest.raises(
        UserError, match=r"^train\.mlp = 'triton': needs Triton and an NVIDIA GPU of compute capability"
    ):
        chosen("triton", model())


@pytest.mark.parametrize("best", ["torch", "triton"])
def test_the_fastest_is_taken(best: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    times = {name: Measured([0.002 if name == best else 0.003]) for name in ("torch", "triton")}
    monkeypatch.setattr(choice, "race", lambda variants, device: times)
    made = model()
    (note,) = chosen("auto", made, torch.device("cuda", 0))
    assert note.startswith(f"mlp: {best}; ") and f"{best} 2.00 ms" in note
    assert {block.mlp.variant for block in made.transformer_blocks} == {best}


def test_the_key_is_in_the_config() -> None:
    assert load_config("sdpnet_l", ["train.mlp=triton"]).train.mlp == "triton"
    with pytest.raises(UserError, match=r"train\.mlp"):
        load_config("sdpnet_l", ["train.mlp=cuda"])


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_pytorchs_pass_is_the_feed_forward_parts(rate: float) -> None:
    """Between two products that change nothing, FeedForward computes what is timed, with the bias's gradient."""
    variants = mlp_variants(ModelOptions(dim=8, heads=2, dropout=rate), 2, 32, torch.float32, CPU, compiled=False)
    rows, width = 18, 32
    torch.manual_seed(0)
    found = variants.make["torch"]()()
    torch.manual_seed(0)
    hidden, bias, gradient, keys = mlp._inputs(rows, width, torch.float32, CPU)
    part = FeedForward(width, width, rate)
    up, _, down, outer = part.layers()
    outer.p = 0.0
    with torch.no_grad():
        for layer in (up, down):
            layer.weight.copy_(torch.eye(width))
            layer.bias.zero_()
        up.bias.copy_(bias)
    inputs = hidden.clone().requires_grad_()
    out = part(inputs, torch.stack([keys, keys]))
    out.backward(gradient)
    for ours, theirs in zip(found, (out, inputs.grad, up.bias.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_variants_say_what_they_were_measured_for() -> None:
    variants = mlp_variants(ModelOptions(dropout=0.2), 256, 224, torch.bfloat16, CPU, compiled=True)
    assert variants.what == "torch.bfloat16, GELU of (51456, 3072), dropout 0.2, compiled"
