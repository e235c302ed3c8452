"""Tests of the fused kernel in Triton's interpreter, which is on or off for a whole process.

tests/pipelines/test_fused.py runs this file. The interpreter truncates to bfloat16 instead of rounding, which changes
one unit in the last place; in float16 this happens by chance.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.augment.fused import launch as fused
from sdpnet.pipelines.augment.fused.launch import finish, split_draws
from sdpnet.pipelines.augment.reference.geometry import GEOMETRIC
from sdpnet.pipelines.augment.reference.operations import apply_operations
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import MIX_CUTMIX, MIX_MIXUP, MIX_NONE, BatchPlan, EraseOptions, MixOptions, Plan
from sdpnet.pipelines.planning.policies import Operation, RandAugmentOptions

assert os.environ["TRITON_INTERPRET"] == "1"
LEVELS = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])  # a scale that does not change the levels
RAND = AugmentOptions(randaugment=RandAugmentOptions("randaugment"))
STRENGTHS: dict[Operation, list[float]] = {
    Operation.IDENTITY: [0.0],
    Operation.SHEAR_X: [-0.3, -0.11, 0.0, 0.02, 0.3],
    Operation.SHEAR_Y: [-0.3, -0.11, 0.0, 0.02, 0.3],
    Operation.TRANSLATE_X: [-200.0, -9.0, -0.5, 1.0, 3.7],
    Operation.TRANSLATE_Y: [-200.0, -9.0, -0.5, 1.0, 3.7],
    Operation.ROTATE: [-30.0, -9.0, 0.0, 17.0, 30.0],
    Operation.BRIGHTNESS: [-0.9, -0.27, 0.0, 0.33, 0.9],
    Operation.COLOUR: [-0.9, -0.27, 0.0, 0.33, 0.9],
    Operation.CONTRAST: [-0.9, 0.27],
    Operation.SHARPNESS: [-0.9, 0.27],
    Operation.POSTERIZE: [0.0, 1.0, 4.0, 7.0, 8.0],
    Operation.SOLARIZE: [0.0, 1.0, 100.3, 255.0, 256.0],
    Operation.AUTOCONTRAST: [0.0],
    Operation.EQUALIZE: [0.0],
    Operation.INVERT: [0.0],
    Operation.SOLARIZE_ADD: [0.0, 1.0, 55.0, 110.0, 128.0],
    Operation.GREYSCALE: [0.0],
    Operation.GAUSSIAN_BLUR: [0.4, 2.0],
}


@pytest.fixture(autouse=True)
def larger_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger blocks: the interpreter takes about the same time for a program of any size."""
    monkeypatch.setattr(fused, "_BLOCK", 512)
    monkeypatch.setattr(fused, "_COUNT_BLOCK", 128)
    monkeypatch.setattr(fused, "_COUNT_BLOCKS", 2)


def images_of(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(height).integers(0, 256, (batch, height, width, 3), np.uint8))


def plan_of(batch: int, options: AugmentOptions, image_size: int = 32) -> BatchPlan:
    return Plan(
        seed=1,
        sizes=np.full((batch, 2), 50, np.int32),
        batch_size=batch,
        image_size=image_size,
        randaugment=options.randaugment,
        erase=options.erase,
        mix=options.mix,
    ).batch(0, 0)


def both(
    images: torch.Tensor, options: AugmentOptions, plan: BatchPlan, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of the reference, and the difference of the fused stage's images in levels."""
    n, before = len(images), images.clone()
    batch = Batch(images, torch.arange(n) % 5, torch.arange(n), torch.ones(n, dtype=torch.bool), plan)
    monkeypatch.setattr(fused, "runs_on", lambda device: True)
    stage = DeviceStage(replace(options, fused="verify"), 5, dtype, train=True)
    stage._fused = None if options.randaugment.enabled else True  # verification would run the kernel a second time
    out, targets = stage(batch)
    expected, same_targets = DeviceStage(replace(options, fused="off"), 5, dtype, train=True)(batch)
    assert torch.equal(targets, same_targets) and torch.equal(images, before)
    assert out.dtype == dtype and out.shape == expected.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    return expected, (out.float() - expected.float()).abs() * 255 * torch.tensor(options.std).view(1, 3, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["none", "constant", "colour", "pixel"])
def test_erasing_and_mixing(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of mixing in one batch; boxes at corners, over the image, and none; a partner's box; a broken pair."""
    erase = EraseOptions() if mode == "none" else EraseOptions(0.5, mode=mode)  # type: ignore[arg-type]
    options = AugmentOptions(erase=erase, mix=MixOptions(0.8, 1.0))
    plan = replace(
        plan_of(6, options),
        erase_boxes=np.array(
            [[0, 0, 5, 7], [3, 4, 20, 11], [0, 0, 0, 0], [20, 10, 3, 9], [0, 0, 23, 19], [13, 0, 1, 19]], np.int32
        ),
        erase_keys=np.array([-1, 2**62 + 12345, 0, -(2**63), 77, 2**31], np.int64),
        mix_kinds=np.array([MIX_MIXUP, MIX_MIXUP, MIX_CUTMIX, MIX_CUTMIX, MIX_NONE, MIX_CUTMIX], np.uint8),
        mix_partners=np.array([1, 0, 3, 2, 4, 1], np.int64),
        mix_lambdas=np.array([0.3, 0.7, 0.5, 0.0, 1.0, 0.9], np.float32),
        mix_boxes=np.array(
            [[0, 0, 9, 9], [0, 0, 0, 0], [4, 5, 17, 6], [0, 0, 23, 19], [1, 1, 5, 5], [13, 3, 1, 9]], np.int32
        ),
    )
    monkeypatch.setattr(fused, "_BLOCK", 256)  # two blocks, which meet in row 13
    expected, levels = both(images_of(6, 23, 19), options, plan, dtype, monkeypatch)
    assert expected.float().std() > 0.5
    if mode in ("none", "constant") and dtype != torch.bfloat16:
        assert levels.max() == 0
    else:  # float32: the last bits of logarithm and cosine
        unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert (levels <= 1e-3 + expected.float().abs() * unit * 255 * max(options.std)).all() and levels.max() <= 1


def test_nothing_but_normalising() -> None:
    images = images_of(3, 7, 5)
    scale = torch.tensor([0.5, 0.25, 2.0, -1.0, 0.0, 3.0])
    out = finish(images, scale, torch.float32, AugmentOptions(), None)
    assert torch.equal(out, images.permute(0, 3, 1, 2).float() * scale[:3].view(3, 1, 1) + scale[3:].view(3, 1, 1))


@pytest.mark.parametrize("size", [(17, 24), (6, 3)])
@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.name.lower())
def test_each_operation(operation: Operation, size: tuple[int, int]) -> None:
    if operation == Operation.GAUSSIAN_BLUR and min(size) < 7:
        pytest.skip("blur needs 7 pixels")
    strengths = np.array(STRENGTHS[operation], np.float32)[:, None]
    images = images_of(len(strengths), *size)
    plan = replace(
        plan_of(len(strengths), AugmentOptions()),
        ops=np.full(strengths.shape, operation, np.uint8),
        magnitudes=strengths,
    )
    out = finish(images, LEVELS, torch.float32, RAND, plan)
    assert torch.equal(out, apply_operations(images.permute(0, 3, 1, 2), plan.ops, plan.magnitudes).float())


def assert_equal(
    images: torch.Tensor, operations: np.ndarray, magnitudes: np.ndarray, mode: str, fill: tuple[float, float, float]
) -> None:
    options = replace(RAND, randaugment=RandAugmentOptions("increasing", interpolation=mode, fill=fill))  # type: ignore[arg-type]
    plan = replace(plan_of(len(images), AugmentOptions()), ops=operations, magnitudes=magnitudes)
    out = finish(images, LEVELS, torch.float32, options, plan)
    expected = apply_operations(images.permute(0, 3, 1, 2), operations, magnitudes, interpolation=mode, fill=fill)
    wrong = (out != expected.float()).flatten(1).any(1).numpy()
    assert not wrong.any(), [[Operation(int(op)).name for op in row] for row in operations[wrong]]


@pytest.mark.parametrize("fill", [(0.0, 0.0, 0.0), (124.0, 0.5, 255.0)])
def test_each_operation_of_geometry_bilinearly(fill: tuple[float, float, float]) -> None:
    drawn = [(operation, m) for operation in GEOMETRIC for m in STRENGTHS[operation][1::3]]
    operations, magnitudes = np.array(drawn)[:, :1].astype(np.uint8), np.array(drawn)[:, 1:].astype(np.float32)
    assert_equal(images_of(len(drawn), 9, 13), operations, magnitudes, "bilinear", fill)


def test_statistics_of_unusual_images() -> None:
    """Images of one, two or few levels, with a flat channel or rare extremes; several programs count each image."""
    images = images_of(5, 23, 25)
    images[0] = torch.tensor([7, 0, 255], dtype=torch.uint8)
    images[1] = torch.where(images[1] < 200, 3, 250)
    images[2] = images[2] // 20 + 100
    images[3, :, :, 1] = 77
    images[4] = images[4] // 2 + 60
    images[4, 0, 0], images[4, 22, 24] = 0, 255
    kinds = np.repeat(np.array([Operation.CONTRAST, Operation.AUTOCONTRAST, Operation.EQUALIZE], np.uint8), 5)
    assert_equal(images.repeat(3, 1, 1, 1), kinds[:, None], np.full((15, 1), 0.7, np.float32), "nearest", (0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "fill", "kinds"),
    [
        ("nearest", (124.0, 0.5, 255.0), [5, 7, 8, 9, 13, 17]),  # rotate, colour, contrast, sharpness, equalize, blur
        ("bilinear", (0.0, 0.0, 0.0), [3, 5, 7, 9, 12, 13]),
    ],
)
def test_pairs_of_operations(mode: str, fill: tuple[float, float, float], kinds: list[int]) -> None:
    """Each kind of computation before and after each other one and itself."""
    operations = np.array([(first, then) for first in kinds for then in kinds], np.uint8)
    magnitudes = np.vectorize(lambda op: STRENGTHS[Operation(op)][-1])(operations).astype(np.float32)
    assert_equal(images_of(len(operations), 9, 7), operations, magnitudes, mode, fill)


@pytest.mark.parametrize(("mode", "fill"), [("nearest", (0.0, 0.0, 0.0)), ("bilinear", (1.0, 2.5, 3.0))])
def test_operations_in_turn(mode: str, fill: tuple[float, float, float]) -> None:
    """Three operations of all kinds in a sample: two geometric ones, operations on fill, some before the kernels."""
    rng, count = np.random.default_rng(3), 28
    operations = rng.choice(np.array(list(Operation), np.uint8), (count, 3))
    operations[:10] = rng.choice(np.arange(1, 8, dtype=np.uint8), (10, 3))
    magnitudes = np.vectorize(lambda op: rng.choice(STRENGTHS[Operation(op)]))(operations).astype(np.float32)
    before, then = split_draws(operations)
    assert ((before > 0).any(1) & (then > 0).any(1)).any()
    assert_equal(images_of(count, 13, 18), operations, magnitudes, mode, fill)


@pytest.mark.parametrize("policy", ["randaugment", "increasing", "three"])
def test_all_together(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = AugmentOptions(
        randaugment=RandAugmentOptions(policy),
        erase=EraseOptions(0.5),
        mix=MixOptions(0.8, 1.0),
        label_smoothing=0.1,  # type: ignore[arg-type]
    )
    _, levels = both(images_of(6, 21, 21), options, plan_of(6, options, 21), torch.float16, monkeypatch)
    assert levels.max() <= 1 and (levels == 0).float().mean() > 0.999
