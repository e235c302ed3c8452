from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_programs import needs_interpreter, needs_triton, run

from sdpnet.model.kernels import depthwise

ROOT = Path(__file__).resolve().parents[2]


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    "tests",
    [
        "shape0 or far_from or conv_block or autocast",
        pytest.param("(float64 and not shape0) or compiled or distributed", marks=pytest.mark.slow),
        pytest.param("tiles_meet", marks=pytest.mark.slow),
        pytest.param("half_precision or layouts or without or fault or recomputed", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(tests: str) -> None:
    pytest_options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-k", tests)
    run("-m", "pytest", *pytest_options, "tests/support/depthwise_in_interpreter.py", TRITON_INTERPRET="1")


COMPILE = """
import sys
from kernel_compilation import compiled_for, resources
from sdpnet.model.kernels.depthwise_kernel import convolve_kernel, weight_gradient_kernel
capability, image, kernel_size, width = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tile = -(-width // -(-width // 16))
constants = dict(DIM=768, KERNEL=kernel_size, TILE=tile, ROWS=14, WHOLE=tile == width, BLOCK=64)
types = dict.fromkeys(("x", "factor", "out", "slope", "gradient"), image)
types |= dict.fromkeys(("weight", "bias", "partial"), "*fp32")
for kernel, static in (
    (convolve_kernel, dict(constants, BACKWARD=False, SLOPE=True)),
    (convolve_kernel, dict(constants, BACKWARD=False, SLOPE=False)),
    (convolve_kernel, dict(constants, BACKWARD=True, SLOPE=False)),
    (weight_gradient_kernel, constants),
):
    options = {"num_warps": 1, "enable_fp_fusion": True}
    compiled = compiled_for(capability, kernel, static, types, options)
    assert compiled.metadata.shared == 0 and "fma.rn.f32" in compiled.asm["ptx"]
    usage = resources(compiled, sys.argv[5])
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage  # registers hold everything
    print(kernel.__name__, *(word for word in usage if word.startswith("REG:")))
"""


@needs_triton
@pytest.mark.parametrize(
    ("capability", "image", "kernel_size", "width"),
    [
        ("90", "*bf16", "3", "24"),  # two tiles
        pytest.param("90", "*bf16", "7", "14", marks=pytest.mark.slow),
        pytest.param("80", "*fp16", "7", "14", marks=pytest.mark.slow),
        pytest.param("80", "*fp32", "7", "14", marks=pytest.mark.slow),
        pytest.param("80", "*bf16", "9", "8", marks=pytest.mark.slow),
        pytest.param("70", "*fp16", "7", "14", marks=pytest.mark.slow),
        pytest.param("70", "*fp32", "7", "14", marks=pytest.mark.slow),
        pytest.param("75", "*fp16", "7", "14", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_gpus_that_are_not_here(
    capability: str, image: str, kernel_size: str, width: str, tmp_path: Path
) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run("-c", COMPILE, capability, image, kernel_size, width, str(tmp_path), **environment)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on = depthwise.runs_on.__wrapped__  # without its memory
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(depthwise, "_kernels", lambda: object())
    for capability, expected in (((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert runs_on(gpu) == expected
        assert depthwise.compiles_for.__wrapped__(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not runs_on(gpu) and not depthwise.compiles_for.__wrapped__(gpu)
    assert not runs_on(torch.device("cpu"))
    monkeypatch.setattr(depthwise, "_kernels", lambda: None)
    assert not runs_on(gpu)
