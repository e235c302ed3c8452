"""The feed-forward part of the transformer blocks: our kernels against PyTorch's operations, and the choice."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from triton_programs import needs_interpreter, needs_triton, run

from sdpnet.config.load import load_config
from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants import choice
from sdpnet.execution.variants.choice import Measured
from sdpnet.execution.variants.mlp import choose_mlp, mlp_variants
from sdpnet.model.feed_forward import FeedForward
from sdpnet.model.kernels import cublaslt, feed_forward
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
import subprocess, sys
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sdpnet.model.kernels import feed_forward
from sdpnet.model.kernels.feed_forward_kernel import gelu_dropout_backward_kernel, gelu_dropout_kernel
capability, hidden, width, drops = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "drops"
constants = feed_forward._constants(torch.empty(1, width), torch.empty(int(drops)))
options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": True}
types = {**dict.fromkeys(("hidden", "out", "gradient"), hidden), **dict.fromkeys(("bias", "partial"), "*fp32")}
types |= {**dict.fromkeys(("row_keys", "column_keys"), "*i32"), "scale": "fp32"}
for kernel in (gelu_dropout_kernel, gelu_dropout_backward_kernel):
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    pointers = [(n,) for n, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    aligned = dict.fromkeys(pointers, [["tt.divisibility", 16]])
    target = GPUTarget("cuda", capability, 32)
    compiled = compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 8192 and "div." not in ptx
    assert not constants["EVEN"] or all("v4" in line for line in ptx.splitlines() if "st.global" in line)  # 16 bytes
    cubin = Path(sys.argv[5]) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout.split()
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


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    epilogue: str = "none",
    bias: torch.Tensor | None = None,
    aux: torch.Tensor | None = None,
    *,
    transposed: bool,
) -> torch.Tensor:
    """What `cublaslt.product` is documented to compute, by PyTorch."""
    out = b @ (a.t() if transposed else a)
    if epilogue == "gelu":
        assert bias is not None and aux is not None
        aux.copy_(out + bias)
        return F.gelu(aux, approximate="tanh")
    assert epilogue == "gelu backward" and bias is not None and aux is not None
    out = torch.ops.aten.gelu_backward(out, aux, approximate="tanh")
    bias.copy_(out.sum(0))
    return out


@pytest.fixture
def products_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "product", product)


def part(variant: str, dim: int = 16, rate: float = 0.0) -> FeedForward:
    torch.manual_seed(0)
    made = FeedForward(dim, 4 * dim, rate)
    made.variant = variant  # type: ignore[assignment]
    return made


def step(module: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """The result and all gradients, under autocast."""
    inputs = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        out = module(inputs)
    (out.float() * torch.arange(out.numel()).reshape(out.shape).sin()).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in (inputs, *module.parameters()) if tensor.grad is not None)]


@pytest.mark.usefixtures("products_by_torch")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_products_of_cublaslt_make_the_same_step(compiled: bool) -> None:
    x = torch.randn(3, 7, 16)
    ours: torch.nn.Module = part("cublaslt")
    if compiled:
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    for found, expected in zip(step(ours, x), step(part("torch"), x), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert (found - expected).float().norm() <= 0.02 * expected.float().norm()


@pytest.mark.usefixtures("products_by_torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's copies
def test_torch_finds_no_fault_with_the_operations_of_cublaslt() -> None:
    shapes = (6, 8), (32, 8), (32,), (8, 32), (8,)
    inputs = tuple(torch.randn(shape, requires_grad=True) for shape in shapes)
    torch.library.opcheck(torch.ops.sdpnet.linear_gelu_linear, inputs)
    backward = torch.randn(6, 8), torch.randn(8, 32), torch.randn(6, 32)
    torch.library.opcheck(torch.ops.sdpnet.gelu_backward_product, backward)


def test_cublaslt_computes_only_training_without_dropout_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cublaslt, "product")
    x = torch.randn(2, 3, 16)
    assert torch.equal(part("cublaslt")(x), part("torch")(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part("cublaslt").eval()(x), part("torch").eval()(x))
        part("cublaslt", rate=0.5)(x)
        with pytest.raises(NameError):
            part("cublaslt")(x)


def test_cublaslts_descriptions_hold_what_is_set() -> None:
    """The library itself, which needs no GPU for this, knows all attributes and says their sizes."""
    try:
        library = cublaslt.library()
    except OSError:
        pytest.skip("cuBLASLt is not installed")
    bias, aux = torch.zeros(32, dtype=torch.bfloat16), torch.zeros(16, 32, dtype=torch.bfloat16)
    description = cublaslt._description("gelu backward", bias, aux, transposed=True)
    read = library.cublasLtMatmulDescGetAttribute
    read.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for (number, kind), expected in {
        cublaslt._TRANS_A: 1,
        cublaslt._TRANS_B: 0,
        cublaslt._EPILOGUE: 64 + 128 + 16,
        cublaslt._BIAS_POINTER: bias.data_ptr(),
        cublaslt._AUX_POINTER: aux.data_ptr(),
        cublaslt._AUX_LD: 32,
        cublaslt._BIAS_TYPE: 14,
    }.items():
        content, written = kind(), ctypes.c_size_t()
        assert read(description, number, ctypes.byref(content), ctypes.sizeof(content), ctypes.byref(written)) == 0
        assert (content.value, written.value) == (expected, ctypes.sizeof(content))
    assert ctypes.sizeof(cublaslt._Heuristic) == 64 + 8 + 4 + 4 + 16
    with pytest.raises(RuntimeError, match=r"^cublasLtMatmulDescSetAttribute: CUBLAS_STATUS_INVALID_VALUE$"):
        cublaslt._set(description, (999, ctypes.c_int32), 0)


def test_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(feed_forward, "_kernels", lambda: object())
    monkeypatch.setattr(cublaslt, "library", lambda: object())
    for module in (feed_forward, cublaslt):
        runs_on = module.runs_on.__wrapped__  # without its memory
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


@pytest.mark.parametrize(
    ("asked", "options", "dtype", "message"),
    [
        ("triton", {}, torch.bfloat16, "train.mlp = 'triton': needs Triton and an NVIDIA GPU of compute capability"),
        (
            "cublaslt",
            {"dropout": 0.1},
            torch.bfloat16,
            "train.mlp = 'cublaslt': has no dropout; set model.dropout to 0",
        ),
        ("cublaslt", {}, torch.float32, "train.mlp = 'cublaslt': needs half precision"),
        ("cublaslt", {}, torch.bfloat16, "train.mlp = 'cublaslt': needs cuBLASLt"),
    ],
)
def test_what_cannot_run_is_a_mistake(asked: str, options: dict[str, object], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen(asked, model(**options), dtype=dtype)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("best", ["torch", "triton", "cublaslt"])
def test_the_fastest_is_taken(best: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    times = {name: Measured([0.002 if name == best else 0.003]) for name in ("torch", "triton", "cublaslt")}
    monkeypatch.setattr(choice, "race", lambda variants, device: times)
    made = model()
    (note,) = chosen("auto", made, torch.device("cuda", 0))
    assert note.startswith(f"mlp: {best}; ") and f"{best} 2.00 ms" in note
    assert {block.mlp.variant for block in made.transformer_blocks} == {best}


def test_the_key_is_in_the_config() -> None:
    assert load_config("sdpnet_l", ["train.mlp=triton"]).train.mlp == "triton"
    with pytest.raises(UserError, match=r"train\.mlp"):
        load_config("sdpnet_l", ["train.mlp=cuda"])


def test_variants_say_what_they_were_measured_for() -> None:
    variants = mlp_variants(ModelOptions(dropout=0.2), 256, 224, torch.bfloat16, CPU, compiled=True)
    assert variants.what == "torch.bfloat16, (256, 201, 768), hidden 3072, dropout 0.2, compiled"
