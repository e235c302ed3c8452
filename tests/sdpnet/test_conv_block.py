"""The fused conv block: in Triton's interpreter, compiled for GPUs that are not here, on a GPU, and its choice."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton_programs import needs_interpreter, needs_triton, run

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants import choice, conv_block
from sdpnet.execution.variants.choice import Measured
from sdpnet.execution.variants.conv_block import CANDIDATES, choose_conv_block, conv_block_variants
from sdpnet.model.sdpnet import ConvBlock, SdPNet, create_model_options
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

CPU = torch.device("cpu")
ALONE = Processes(ShardOptions(), CPU)
ON_GPU = Processes(ShardOptions(), torch.device("cuda", 0))


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    "tests",
    [
        "shape0 or shape1 or large_beside or (autocast and bfloat16) or evaluation",
        pytest.param("(float64 and not shape0 and not shape1) or meet", marks=pytest.mark.slow),
        pytest.param("float16 or bits or layouts or fault", marks=pytest.mark.slow),
        pytest.param("compiled or synchronized or distributed or recomputed", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(tests: str) -> None:
    pytest_options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-k", tests)
    run("-m", "pytest", *pytest_options, "tests/support/conv_block_in_interpreter.py", TRITON_INTERPRET="1")


COMPILE = """
import sys
from kernel_compilation import compiled_for, resources
from sdpnet.model.kernels import batch_norm_kernel as kernels
from sdpnet.model.kernels.depthwise_kernel import convolve_kernel
capability, image, dim = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
types = dict.fromkeys(("values", "residual", "gradient", "out", "x", "factor", "slope"), image)
types |= dict.fromkeys(("partial", "statistics", "weight", "bias", "sums"), "*fp32") | {"eps": "fp32"}
tile = dict(DIM=dim, ROWS=16, CHANNELS=128)
depthwise = dict(DIM=dim, KERNEL=7, TILE=14, ROWS=14, WHOLE=True, BLOCK=64, BACKWARD=True, SLOPE=False)
both = [
    (kernel, dict(tile, GELU=gelu, **more))
    for gelu in (False, True)
    for kernel, more in (
        (kernels.batch_norm_statistics_kernel, {}),
        (kernels.batch_norm_apply_kernel, dict(RESIDUAL=not gelu, FACTOR=not gelu)),
        (kernels.batch_norm_sums_kernel, dict(FACTOR=not gelu)),
        (kernels.batch_norm_backward_kernel, dict(FACTOR=not gelu)),
    )
]
finish = dict(DIM=dim, GELU=True, PROGRAMS=64, CHANNELS=32)
for kernel, static in (*both, (kernels.batch_norm_finish_kernel, finish), (convolve_kernel, depthwise)):
    options = {"num_warps": 1 if kernel is convolve_kernel else 4, "enable_fp_fusion": True}
    compiled = compiled_for(capability, kernel, static, types, options)
    assert "ld.global.v4.b32" in compiled.asm["ptx"] or kernel in (convolve_kernel, kernels.batch_norm_finish_kernel)
    usage = resources(compiled, sys.argv[4])
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage  # registers hold everything
    assert compiled.metadata.shared <= 4096
    print(kernel.__name__, *(word for word in usage if word.startswith("REG:")))
"""


@needs_triton
@pytest.mark.parametrize(
    ("capability", "image", "dim"),
    [
        ("90", "*bf16", "768"),
        pytest.param("80", "*fp16", "768", marks=pytest.mark.slow),
        pytest.param("100", "*bf16", "768", marks=pytest.mark.slow),
        pytest.param("80", "*fp32", "192", marks=pytest.mark.slow),
    ],
)
def test_compiles_for_gpus_that_are_not_here(capability: str, image: str, dim: str, tmp_path: Path) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run("-c", COMPILE, capability, image, dim, str(tmp_path), **environment)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_agrees_with_pytorch_on_a_gpu(dtype: torch.dtype, compiled: bool) -> None:
    """At the shape of the XL model, to the tolerance of the choice among variants."""
    variants = conv_block_variants(CANDIDATES, (256, 768, 14, 14), 7, dtype, ON_GPU.device, compiled=compiled)
    measured = choice.race(variants, ON_GPU.device, rounds=1)
    torch._dynamo.reset()
    assert not any(row.reason for row in measured.values()), measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_running_statistics_on_a_gpu() -> None:
    torch.manual_seed(0)
    plain = ConvBlock(768, 7, 0.2).to(ON_GPU.device).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    fused.fused = True
    x = torch.randn(32, 768, 14, 14, device=ON_GPU.device).to(memory_format=torch.channels_last)
    for block in (plain, fused):
        torch.manual_seed(1)
        block(x)
    for expected, found in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # cuDNN's convolutions round to TF32


def model_of(**options: int) -> SdPNet:
    return SdPNet(create_model_options("sdpnet_tiny", 3, **options))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[choice.Variants]:
    """Stands for a GPU on which the later ones of the candidates are the faster ones; returns what was raced."""
    raced: list[choice.Variants] = []

    def race(variants: choice.Variants, device: torch.device) -> dict[str, Measured]:
        raced.append(variants)
        return {name: Measured([10.0 - list(CANDIDATES).index(name)]) for name in variants.make}

    monkeypatch.setattr(choice, "race", race)
    monkeypatch.setattr(choice, "_known", lambda variants, device: None)
    monkeypatch.setattr(choice, "_keep", lambda variants, device, measured: None)
    monkeypatch.setattr(choice, "from_main", lambda value, processes: value)
    monkeypatch.setattr(conv_block, "runs_on", lambda device: True)
    return raced


def chosen(options: TrainOptions, processes: Processes = ON_GPU, batch_size: int = 8) -> str:
    model = model_of()
    names = list(model.state_dict())
    choose_conv_block(options, model, batch_size, 32, torch.bfloat16, processes)
    assert list(model.state_dict()) == names
    (all_blocks,) = {(block.triton, block.fused) for block in model.conv_blocks}
    return {attributes: name for name, attributes in CANDIDATES.items()}[all_blocks]


@pytest.mark.parametrize(
    ("options", "raced", "expected"),
    [
        (TrainOptions(), "torch depthwise triton", "triton"),
        (TrainOptions(memory_format="probe"), "torch depthwise triton", "triton"),
        (TrainOptions(memory_format="contiguous"), "torch depthwise", "depthwise"),
        (TrainOptions(conv_block="torch"), "torch depthwise", "depthwise"),
        (TrainOptions(depthwise="triton"), "depthwise triton", "triton"),
        (TrainOptions(depthwise="triton", conv_block="torch"), "", "depthwise"),
        (TrainOptions(depthwise="torch"), "", "torch"),
        (TrainOptions(conv_block="triton"), "", "triton"),
        (TrainOptions(conv_block="triton", depthwise="triton"), "", "triton"),
    ],
)
def test_keys_restrict_the_candidates(
    gpu: list[choice.Variants], options: TrainOptions, raced: str, expected: str
) -> None:
    assert chosen(options) == expected
    assert [list(variants.make) for variants in gpu] == [raced.split()] * bool(raced)
    assert all(variants.what.endswith(f"torch.{_format(options)}") for variants in gpu)


def _format(options: TrainOptions) -> str:
    return "contiguous_format" if options.memory_format == "contiguous" else "channels_last"


def test_the_shape_of_a_pass(gpu: list[choice.Variants]) -> None:
    """It is that of a micro batch, so that training finds the graphs of torch.compile, but of 256 images at most."""
    for options, batch_size, images in (
        (TrainOptions(), 8, 8),
        (TrainOptions(micro_batch=2), 8, 2),
        (TrainOptions(micro_batch="auto"), 1000, 256),
        (TrainOptions(compile=True), 8, 8),
    ):
        chosen(options, batch_size=batch_size)
        compiled = ", compiled" if options.compile is True else ""
        expected = f"torch.bfloat16, ({images}, 128, 4, 4), kernel 7, torch.channels_last{compiled}"
        assert gpu[-1].what == expected


@pytest.mark.parametrize(
    ("options", "words", "instead"),
    [
        (TrainOptions(depthwise="torch"), "which train.depthwise = torch excludes", "torch"),
        (TrainOptions(memory_format="contiguous"), "needs train.memory_format = channels_last or probe", "depthwise"),
        (TrainOptions(sync_batch_norm=True), "which train.sync_batch_norm asks for", "depthwise"),
    ],
)
def test_where_the_kernels_cannot_take_the_block(
    gpu: list[choice.Variants], options: TrainOptions, words: str, instead: str
) -> None:
    processes = Processes(ShardOptions(0, 2), ON_GPU.device) if options.sync_batch_norm else ON_GPU
    assert chosen(options, processes) == instead
    with pytest.raises(UserError, match=rf"^train.conv_block = 'triton': .*{words}"):
        chosen(replace(options, conv_block="triton"), processes)


@pytest.mark.parametrize("key", ["conv_block", "depthwise"])
def test_on_a_cpu(key: str) -> None:
    assert chosen(TrainOptions(), ALONE) == "torch"
    with pytest.raises(UserError, match=rf"^train.{key} = 'triton': needs Triton and an NVIDIA GPU .*; use auto or"):
        chosen(replace(TrainOptions(), **{key: "triton"}), ALONE)


def test_without_conv_blocks_nothing_is_timed(gpu: list[choice.Variants]) -> None:
    assert choose_conv_block(TrainOptions(), model_of(conv_blocks=0), 8, 32, torch.bfloat16, ON_GPU) == []
    assert not gpu


@pytest.mark.parametrize("backward", [True, False])
def test_the_plain_variant_runs_on_a_cpu(backward: bool) -> None:
    variants = conv_block_variants(["torch"], (2, 4, 5, 3), 3, torch.bfloat16, CPU, backward=backward)
    one_pass = variants.make["torch"]()
    assert len(one_pass()) == len(one_pass()) == (10 if backward else 1)
    measured = choice.race(variants, CPU, rounds=1)
    assert not measured["torch"].reason and len(measured["torch"].seconds) == 1
