from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from operations_digest import LIMITS
from triton_programs import needs_interpreter, needs_triton, run

from sdpnet.config.load import dump_config, load_config
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.augment.fused import launch as fused
from sdpnet.pipelines.augment.reference.operations import apply_operations
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import EraseOptions, MixOptions, Plan
from sdpnet.pipelines.planning.policies import Operation, RandAugmentOptions

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = AugmentOptions(
    randaugment=RandAugmentOptions("randaugment"), erase=EraseOptions(0.5, mode="pixel"), mix=MixOptions(0.8, 1.0)
)


@needs_triton
@needs_interpreter
@pytest.mark.parametrize(
    "tests",
    [
        "nothing_but or (erasing and float32) or each_operation or unusual or (pairs and nearest) or all_together",
        pytest.param("(erasing and not float32) or (pairs and bilinear) or in_turn", marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference_in_the_interpreter(tests: str) -> None:
    pytest_options = ("-q", "--noconftest", "-p", "no:cacheprovider", "-k", tests)
    run("-m", "pytest", *pytest_options, "tests/support/fused_in_interpreter.py", TRITON_INTERPRET="1")


COMPILE = """
import sys
from kernel_compilation import compiled_for
from sdpnet.pipelines.augment.fused import launch
from sdpnet.pipelines.augment.fused.finish import finish_kernel
from sdpnet.pipelines.augment.fused.neighbours import neighbour_kernel
from sdpnet.pipelines.augment.fused.statistics import count_kernel, table_kernel
capability, out, erase = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
types = dict(images="*u8", prepared="*u8", tables="*u8", counts="*i32", draws="*i32", scale="*fp32", out=out)
types |= dict.fromkeys(("red", "green", "blue"), "fp32")
for kernel, static in (
    (finish_kernel, dict(COLUMNS=2, ERASE=erase, MIX=erase >= 0, BLOCK=256)),
    (neighbour_kernel, dict(COLUMNS=2, BLOCK=256)),
    (count_kernel, dict(COLUMNS=2, BLOCK=launch._COUNT_BLOCK, BLOCKS=launch._COUNT_BLOCKS)),
    (table_kernel, dict(COLUMNS=2)),
):
    compiled = compiled_for(capability, kernel, static, types, {"enable_fp_fusion": False}, aligned=False)
    assert compiled.asm["cubin"]
    # Products and sums are rounded one by one, except in the noise, whose cosine has contractions of its own.
    assert (kernel is finish_kernel and erase >= 1) or "fma." not in compiled.asm["ptx"]
    assert kernel is not table_kernel or "div.rn.f32" in compiled.asm["ptx"]
    if erase < 0:
        break
"""


@needs_triton
@pytest.mark.parametrize(
    ("capability", "out", "erase"),
    [
        pytest.param("75", "*fp16", "2", marks=pytest.mark.slow),
        pytest.param("80", "*bf16", "1", marks=pytest.mark.slow),
        ("90", "*bf16", "0"),
        ("90", "*fp32", "-1"),  # the last kernel alone
    ],
)
def test_compiles_for_gpus_that_are_not_here(capability: str, out: str, erase: str, tmp_path: Path) -> None:
    run("-c", COMPILE, capability, out, erase, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_on = fused.runs_on.__wrapped__  # without its memory
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fused, "_kernels", lambda: object())
    for capability, expected in (((7, 0), False), ((7, 5), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert runs_on(gpu) == expected
    assert not runs_on(torch.device("cpu"))
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    assert not runs_on(gpu)


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sdpnet.pipelines.augment.fused.finish", raising=False)
    monkeypatch.delattr("sdpnet.pipelines.augment.fused.finish", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fused._kernels.__wrapped__() is None


def test_the_setting_is_read_and_written() -> None:
    for setting in ("auto", "verify", "off"):
        config = load_config("cifar10", [f"augment.fused={setting}"])
        assert config.augment.fused == setting
        assert yaml.safe_load(dump_config(config))["augment"]["fused"] == setting
    assert load_config("debug").augment.fused == "verify"
    with pytest.raises(UserError, match=r"augment\.fused = 'of'.*off"):
        load_config("debug", ["augment.fused=of"])
    with pytest.raises(UserError, match=r"augment\.fused = True"):
        load_config("debug", ["augment.fused=on"])


def test_a_bad_setting_ends_in_one_line() -> None:
    with pytest.raises(UserError, match=r"augment\.fused = 'on'.*auto, verify or off"):
        AugmentOptions(fused="on")  # type: ignore[arg-type]


def test_the_reference_does_all_up_to_a_blur() -> None:
    before = np.array([[0, 0, 0], [9, 6, 17], [17, 17, 0], [0, 0, 0], [17, 0, 0]], np.uint8)
    then = np.array([[5, 9, 1], [0, 0, 0], [0, 0, 12], [16, 13, 14], [0, 0, 9]], np.uint8)
    got_before, got_then = fused.split_draws(before + then)
    assert got_before.tolist() == before.tolist() and got_then.tolist() == then.tolist()
    assert got_before.dtype == got_then.dtype == np.uint8
    every = np.array([list(Operation)], np.uint8).T
    assert every[fused.split_draws(every)[0].any(axis=1)].tolist() == [[Operation.GAUSSIAN_BLUR]]


class Recorder:
    """Stands for a module of kernels: `recorder.count_kernel[grid](...)` notes the name and the arguments."""

    def __init__(self, launches: list[tuple[str, tuple[Any, ...]]]) -> None:
        self.launches = launches

    def __getattr__(self, kernel: str) -> dict[tuple[int, ...], Any]:
        launches = self.launches

        class Launcher(dict[tuple[int, ...], Any]):
            def __missing__(self, grid: tuple[int, ...]) -> Any:
                return lambda *arguments, **static: launches.append((kernel, arguments))

        return Launcher()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_passes_are_decided_without_the_device(interpolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device a value that the host asked for would be an error: there is none to wait for."""
    launches: list[tuple[str, tuple[Any, ...]]] = []
    monkeypatch.setattr(fused, "_kernels", lambda: (Recorder(launches),) * 3)
    draws = np.array([[9, 8, 1], [12, 6, 0], [0, 9, 9], [17, 6, 13]], np.uint8)
    plan = replace(batch_of(4).plan, ops=draws, magnitudes=np.ones((4, 3), np.float32))
    randaugment = RandAugmentOptions("randaugment", interpolation=interpolation)  # type: ignore[arg-type]
    options = replace(OPTIONS, randaugment=randaugment)
    images, scale = torch.empty((4, 16, 16, 3), dtype=torch.uint8, device="meta"), torch.ones(6, device="meta")
    out = fused.finish(images, scale, torch.float16, options, plan)
    assert out.shape == (4, 3, 16, 16) and out.dtype == torch.float16 and out.device.type == "meta"
    statistics, neighbours = ["count_kernel", "table_kernel"], ["neighbour_kernel"]
    columns = [*statistics, *neighbours, *statistics, *neighbours, *statistics, *neighbours]
    assert [kernel for kernel, _ in launches] == [*columns, "finish_kernel"]
    assert (
        len({id(value) for _, values in launches for value in values if getattr(value, "dtype", 0) == torch.int32}) == 2
    )
    prepared = launches[-1][1][1]
    assert len(prepared) == (5 if interpolation == "bilinear" else 4)  # a blur, sharpness thrice, a shear
    launches.clear()
    fused.finish(images, scale, torch.float16, options, replace(plan, ops=draws * 0 + 6))
    assert [kernel for kernel, _ in launches] == ["finish_kernel"]


def batch_of(count: int) -> Batch:
    sizes, images = np.full((count, 2), 50, np.int32), torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)
    draws = {"randaugment": OPTIONS.randaugment, "erase": OPTIONS.erase, "mix": OPTIONS.mix}
    plan = Plan(seed=0, sizes=sizes, batch_size=count, image_size=16, **draws).batch(0, 0)  # type: ignore[arg-type]
    return Batch(images, torch.arange(count), torch.arange(count), torch.ones(count, dtype=torch.bool), plan)


def stage(setting: str) -> DeviceStage:
    options = AugmentOptions(randaugment=OPTIONS.randaugment, erase=OPTIONS.erase, mix=OPTIONS.mix, fused=setting)  # type: ignore[arg-type]
    return DeviceStage(options, 8, torch.float16, train=True)


@pytest.mark.parametrize("setting", ["auto", "verify"])
def test_on_a_cpu_it_is_the_reference(setting: str) -> None:
    batch = batch_of(8)
    for ours, expected in zip(stage(setting)(batch), stage("off")(batch), strict=True):
        assert torch.equal(ours, expected)


def test_verifying_refuses_pixels_that_are_not_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, reference = batch_of(8), DeviceStage(OPTIONS, 8, torch.float32, train=True)
    right = reference(batch)[0]
    monkeypatch.setattr(fused, "runs_on", lambda device: True)

    def finish_with(levels: float, values: int) -> Any:
        """`fused.finish` with so many values so many levels off."""
        wrong = right.clone(memory_format=torch.contiguous_format)
        wrong.view(-1)[:values] += levels / (255 * OPTIONS.std[0])  # the first image's red values
        return lambda images, scale, dtype, options, plan: wrong.to(dtype, memory_format=torch.channels_last)

    assert right.numel() == 6144
    monkeypatch.setattr(fused, "finish", finish_with(0.005, 200))  # more than the noise's last bits were
    assert torch.allclose(stage("verify")(batch)[0], fused.finish(None, None, torch.float16, None, None))
    for levels, values, share in ((1.5, 20, "0.33%"), (1.0, 1, "0.02%"), (float("nan"), 1, "0.00%")):
        monkeypatch.setattr(fused, "finish", finish_with(levels, values))
        said = rf"^augment\.fused: {share} of .* {levels:.1f} levels\); set augment\.fused to off$"
        with pytest.raises(UserError, match=said):
            stage("verify")(batch)


def test_a_kernel_that_does_not_run_is_said_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(*arguments: object) -> torch.Tensor:
        raise RuntimeError("no C\ncompiler")

    batch, expected = batch_of(8), stage("off")(batch_of(8))[1]
    monkeypatch.setattr(fused, "runs_on", lambda device: True)
    monkeypatch.setattr(fused, "finish", finish)
    auto = stage("auto")
    with pytest.warns(UserWarning, match=r"augment\.fused: .* cannot run here: no C compiler$"):
        first = auto(batch)
    again = auto(batch)  # without a second warning
    assert torch.equal(first[0], stage("off")(batch)[0]) and torch.equal(first[0], again[0])
    assert torch.equal(first[1], expected)
    with pytest.raises(RuntimeError, match="compiler"):
        stage("verify")(batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("mode", "fill"), [("nearest", (124.0, 0.5, 255.0)), ("bilinear", (0.0, 0.0, 0.0)), ("bilinear", (1.0, 2.5, 3.0))]
)
def test_a_gpu_has_the_levels_of_a_cpu(mode: str, fill: tuple[float, float, float]) -> None:
    """All ordered pairs of operations: the kernels on the GPU, the reference there, and the reference on the CPU."""
    operations, magnitudes = every_pair()
    images = torch.randint(0, 256, (len(operations), 37, 45, 3), dtype=torch.uint8)
    randaugment = RandAugmentOptions("randaugment", interpolation=mode, fill=fill)  # type: ignore[arg-type]
    plan = replace(batch_of(len(operations)).plan, ops=operations, magnitudes=magnitudes)
    scale = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], device="cuda")
    out = fused.finish(images.cuda(), scale, torch.float32, AugmentOptions(randaugment=randaugment), plan)
    planes = images.permute(0, 3, 1, 2)
    expected = apply_operations(planes, operations, magnitudes, interpolation=mode, fill=fill)
    there = apply_operations(planes.cuda(), operations, magnitudes, interpolation=mode, fill=fill)
    assert torch.equal(there.cpu(), expected)
    assert torch.equal(out.cpu(), expected.float())


def every_pair() -> tuple[np.ndarray, np.ndarray]:
    """uint8 and float32 (18 * 18, 2)."""
    pairs, rng = list(itertools.product(Operation, repeat=2)), np.random.default_rng(3)
    magnitudes = [[rng.uniform(*LIMITS.get(operation, (-0.9, 0.9))) for operation in pair] for pair in pairs]
    return np.array(pairs, np.uint8), np.array(magnitudes, np.float32)
