from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from sdpnet.pipelines.augment.reference.filters import grey_levels
from sdpnet.pipelines.augment.reference.operations import apply_operations
from sdpnet.pipelines.planning.policies import Operation

pytestmark = pytest.mark.usefixtures("one_thread")  # thousands of small images: threads only cost here

ROOT = Path(__file__).resolve().parents[2]
SAME_EVERYWHERE = (
    "2f6b13d4ecb14961a8f93f2bca7235140dfadaec5bbf52501580f6b5264f2e10"  # of tests/support/operations_digest.py
)
SIZES = [(33, 20), (8, 7), (48, 64)]
FACTORS = np.linspace(-0.9, 0.9, 31)
NONE = [0.0]
OCHRE = (124.0, 116.0, 14.0)
Oracle = Callable[[torch.Tensor, float], torch.Tensor]


def pillow_solarize_add(image: torch.Tensor, added: float) -> torch.Tensor:  # timm's table
    table = [min(255, level + int(added)) if level < 128 else level for level in range(256)]
    return TF.pil_to_tensor(TF.to_pil_image(image).point(table * 3))


def solarize(image: torch.Tensor, threshold: float) -> torch.Tensor:
    return image if threshold > 255 else TF.solarize(image, threshold)  # torchvision refuses 256: nothing inverted


PIXELWISE: dict[Operation, tuple[Oracle, Sequence[float]]] = {
    Operation.IDENTITY: (lambda image, _: image, NONE),
    Operation.BRIGHTNESS: (lambda image, m: TF.adjust_brightness(image, 1 + m), FACTORS),
    Operation.COLOUR: (lambda image, m: TF.adjust_saturation(image, 1 + m), FACTORS),
    Operation.CONTRAST: (lambda image, m: TF.adjust_contrast(image, 1 + m), FACTORS),
    Operation.SHARPNESS: (lambda image, m: TF.adjust_sharpness(image, 1 + m), FACTORS),
    Operation.POSTERIZE: (lambda image, m: TF.posterize(image, int(m)), range(9)),
    Operation.SOLARIZE: (solarize, [*np.linspace(0, 255, 31), 1, 128, 256]),
    Operation.AUTOCONTRAST: (lambda image, _: TF.autocontrast(image), NONE),
    Operation.EQUALIZE: (lambda image, _: TF.equalize(image), NONE),
    Operation.INVERT: (lambda image, _: TF.invert(image), NONE),
    Operation.SOLARIZE_ADD: (pillow_solarize_add, range(0, 129, 8)),
    Operation.GREYSCALE: (lambda image, _: TF.rgb_to_grayscale(image, 3), NONE),
}


def affine(image: torch.Tensor, shear: list[float], shift: list[float], mode: str, fill: list[float]) -> torch.Tensor:
    """As torchvision's RandAugment calls it."""
    degrees = [math.degrees(math.atan(s)) for s in shear]
    center = [0.0, 0.0] if any(shear) else None
    return TF.affine(image, 0.0, shift, 1.0, degrees, InterpolationMode(mode), fill, center)  # type: ignore[arg-type]


GEOMETRIC: dict[Operation, tuple[Callable[..., torch.Tensor], Sequence[float]]] = {
    Operation.SHEAR_X: (lambda i, m, *how: affine(i, [m, 0.0], [0, 0], *how), np.linspace(-0.3, 0.3, 31)),
    Operation.SHEAR_Y: (lambda i, m, *how: affine(i, [0.0, m], [0, 0], *how), np.linspace(-0.3, 0.3, 31)),
    Operation.TRANSLATE_X: (lambda i, m, *how: affine(i, [0.0, 0.0], [m, 0], *how), [*range(-9, 10), -0.5, 3.7, 200]),
    Operation.TRANSLATE_Y: (lambda i, m, *how: affine(i, [0.0, 0.0], [0, m], *how), [*range(-9, 10), -0.5, 3.7, 200]),
    Operation.ROTATE: (
        lambda i, m, mode, fill: TF.rotate(i, m, InterpolationMode(mode), fill=fill),
        np.linspace(-30, 30, 31),
    ),
}


def images_of(count: int, height: int, width: int) -> torch.Tensor:
    """Noise, a narrow range of levels, one level only, a gradient and few pixels off one level, over and over."""
    generator = torch.Generator().manual_seed(height * width)
    noise = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    noise[1::5] = noise[1::5] // 4 + 90
    noise[2::5] = 77
    noise[3::5] = torch.linspace(3, 250, width).to(torch.uint8)
    noise[4::5, :, 1:] = 200
    return noise


def batched(
    images: torch.Tensor, operation: Operation, magnitudes: Sequence[float], mode: str = "nearest", fill=(0.0, 0.0, 0.0)
) -> torch.Tensor:
    draws = np.full((len(images), 1), operation, np.uint8), np.array(magnitudes, np.float32)[:, None]
    return apply_operations(images, *draws, interpolation=mode, fill=fill)


def cases(magnitudes: Sequence[float], size: tuple[int, int], kinds: int = 5) -> tuple[torch.Tensor, list[float]]:
    """Every magnitude, as the plan stores it, on this many kinds of image."""
    strengths = [float(np.float32(m)) for m in magnitudes for _ in range(kinds)]
    return images_of(len(strengths), *size), strengths


def grey_of(image: np.ndarray) -> np.ndarray:
    red, green, blue = image.astype(np.int64)
    return (2989 * red + 5870 * green + 1140 * blue) // 10000


def blend(image: np.ndarray, other: np.ndarray | float, m: float) -> np.ndarray:
    return np.clip(image * (1 + m) - other * m, 0, 255)


def sharpened(image: np.ndarray, m: float) -> np.ndarray:
    height, width = image.shape[1:]
    if min(height, width) <= 2:
        return image
    weights = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])
    mean = sum(
        weights[i, j] * image[:, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)
    )  # 13 times the mean
    out = image.copy()
    out[:, 1:-1, 1:-1] = blend(image[:, 1:-1, 1:-1], np.rint(mean / 13), m)
    return out


# In float64, before levels are cut off to whole ones: float64 (3, H, W), levels -> the same.
EXACT: dict[Operation, Callable[[np.ndarray, float], np.ndarray]] = {
    Operation.BRIGHTNESS: lambda image, m: blend(image, 0.0, m),
    Operation.COLOUR: lambda image, m: blend(image, grey_of(image), m),
    Operation.CONTRAST: lambda image, m: blend(image, grey_of(image).mean(), m),
    Operation.SHARPNESS: sharpened,
    Operation.GREYSCALE: lambda image, m: np.stack([(image * [[[0.2989]], [[0.587]], [[0.114]]]).sum(0)] * 3),
}
CLOSE = 1e-3  # levels, or pixels: nearer to a threshold than this, float32 may fall on either side of it


@pytest.mark.parametrize("operation", PIXELWISE, ids=lambda operation: operation.name.lower())
@pytest.mark.parametrize("size", [*SIZES, (2, 9), (1, 1), (224, 224)])
def test_pixelwise_operations_equal_torchvisions(operation: Operation, size: tuple[int, int]) -> None:
    """Where the exact result is almost a whole number, ours and torchvision's may each be the one below it.

    Which one torchvision's is depends on the processor: it multiplies and adds in one instruction where there is one.
    """
    oracle, magnitudes = PIXELWISE[operation]
    images, strengths = cases(magnitudes if size[0] < 100 else magnitudes[::15], size)
    before = images.clone()
    out = batched(images, operation, strengths)
    assert torch.equal(images, before) and out.is_contiguous()
    different = 0
    for image, strength, result in zip(images, strengths, out, strict=True):
        expected = oracle(image, strength)
        if operation not in EXACT:
            assert torch.equal(result, expected), strength
            continue
        exact = EXACT[operation](image.double().numpy(), strength)
        lowest, highest = np.floor(exact - CLOSE), np.floor(exact + CLOSE)
        assert ((lowest <= result.numpy()) & (result.numpy() <= highest)).all(), strength
        # A grey level of torchvision's can be one too low where the exact one is a whole number.
        whole_grey = (2989 * image[0].int() + 5870 * image[1].int() + 1140 * image[2].int()) % 10000 == 0
        slack = np.where(whole_grey, 1, 0) if operation in (Operation.COLOUR, Operation.GREYSCALE) else 0
        assert ((lowest - slack <= expected.numpy()) & (expected.numpy() <= highest + slack)).all(), strength
        different += int((result != expected).sum())
    assert different <= 0.02 * out.numel()


def test_grey_levels_are_the_exact_sums_whole_part() -> None:
    """Of all 2^24 colours."""
    green, blue = torch.arange(256, dtype=torch.uint8).repeat_interleave(256), torch.arange(256, dtype=torch.uint8)
    green_and_blue = torch.stack([green, blue.repeat(256)])
    exact = 5870 * green_and_blue[0].long() + 1140 * green_and_blue[1].long()
    for red in range(256):
        image = torch.cat([torch.full((1, 65536), red, dtype=torch.uint8), green_and_blue]).view(1, 3, 256, 256)
        assert torch.equal(grey_levels(image).flatten(), ((exact + 2989 * red) // 10000).int()), red


def shifted(image: torch.Tensor, operation: Operation, m: float, by: tuple[float, float], *how: Any) -> torch.Tensor:
    """torchvision's result on float64 images, whose coordinates it computes in float64, moved by a little."""
    shear = [m if operation == Operation.SHEAR_X else 0.0, m if operation == Operation.SHEAR_Y else 0.0]
    move = [m if operation == Operation.TRANSLATE_X else 0.0, m if operation == Operation.TRANSLATE_Y else 0.0]
    degrees = [math.degrees(math.atan(s)) for s in shear]
    centre = [0.0, 0.0] if any(shear) else None
    angle = -m if operation == Operation.ROTATE else 0.0
    to = [move[0] + by[0], move[1] + by[1]]
    mode, fill = how
    return TF.affine(image.double(), angle, to, 1.0, degrees, InterpolationMode(mode), fill, centre)  # type: ignore[arg-type]


@pytest.mark.parametrize("fill", [(0.0, 0.0, 0.0), OCHRE])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("operation", GEOMETRIC, ids=lambda operation: operation.name.lower())
def test_geometric_operations_equal_torchvisions(
    operation: Operation, mode: str, fill: tuple[float, float, float]
) -> None:
    """Pixel by pixel that of float64 coordinates; those that lie between two pixels may take either."""
    oracle, magnitudes = GEOMETRIC[operation]
    how = (mode, list(fill) if any(fill) else None)
    for size in SIZES:
        images, strengths = cases(magnitudes, size, kinds=1)
        out = batched(images, operation, strengths, mode, fill)
        equal = 0
        for image, strength, result in zip(images, strengths, out, strict=True):
            equal += int((result == oracle(image, strength, *how)).sum())
            if mode == "bilinear":
                exact = shifted(image, operation, strength, (0.0, 0.0), *how)
                assert ((result - exact).abs() <= 0.5 + CLOSE).all(), (size, strength)
            else:
                near = [(x, y) for x in (-CLOSE, CLOSE) for y in (-CLOSE, CLOSE)]
                right = [result == shifted(image, operation, strength, by, *how) for by in near]
                assert torch.stack(right).any(0).all(), (size, strength)
        assert equal >= 0.97 * out.numel()


@pytest.mark.parametrize("size", SIZES)
def test_blur_equals_torchvisions_within_a_level(size: tuple[int, int]) -> None:
    images, strengths = cases(np.linspace(0.1, 2.0, 20), size)
    out = batched(images, Operation.GAUSSIAN_BLUR, strengths)
    expected = torch.stack([TF.gaussian_blur(i, [13, 13], [s, s]) for i, s in zip(images, strengths, strict=True)])
    difference = (out.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference == 0).float().mean() > 0.999


def test_blur_is_as_wide_as_pillows() -> None:
    """Pillow's, which DeiT-III used, approximates a Gaussian of this radius by boxes."""
    image = images_of(1, 64, 64)
    for radius in (0.5, 1.0, 2.0):
        ours = batched(image, Operation.GAUSSIAN_BLUR, [radius])[0].permute(1, 2, 0).numpy()
        pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius))
        assert np.abs(ours - np.asarray(pillow, np.float32))[8:-8, 8:-8].mean() < 2.5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_each_sample_gets_its_own_operations_in_order(count: int) -> None:
    """Draws of all kinds, three a sample, interleaved pixels in: as each alone, and as torchvision's one by one."""
    size = (45, 31)
    rng = np.random.default_rng(count)
    kinds, equal = list(PIXELWISE) + list(GEOMETRIC), []
    for _ in range(12):
        images = images_of(count, *size).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        operations = rng.choice(np.array(kinds, np.uint8), (count, 3))
        magnitudes = np.zeros((count, 3), np.float32)
        expected = []
        for i in range(count):
            image = images[i].contiguous()
            for k in range(3):
                operation = Operation(int(operations[i, k]))
                oracle, choices = PIXELWISE.get(operation) or GEOMETRIC[operation]
                magnitudes[i, k] = rng.choice(np.asarray(choices, np.float32))
                how = () if operation in PIXELWISE else ("nearest", None)
                image = oracle(image, float(magnitudes[i, k]), *how)
            expected.append(image)
        out = apply_operations(images, operations, magnitudes)
        one_by_one = images
        for k in range(3):
            draws = operations[:, k : k + 1], magnitudes[:, k : k + 1]
            alone = [
                apply_operations(one_by_one[i : i + 1], draws[0][i : i + 1], draws[1][i : i + 1]) for i in range(count)
            ]
            one_by_one = torch.cat(alone)
        assert torch.equal(out, one_by_one)
        equal.append((out == torch.stack(expected)).float().mean())
    assert np.mean(equal) > 0.98  # one level that is not torchvision's can be carried over the next one's threshold


def test_no_operations_change_nothing() -> None:
    images = images_of(3, 9, 9)
    out = apply_operations(images, np.zeros((3, 0), np.uint8), np.zeros((3, 0), np.float32))
    assert torch.equal(out, images) and out.data_ptr() != images.data_ptr()


def test_results_are_the_same_on_every_processor() -> None:
    """torch has code of its own for each kind of processor; one kind is switched off after the other."""
    best, known = torch.backends.cpu.get_cpu_capability(), ["DEFAULT", "AVX2", "AVX512"]
    digests = set()
    for kind in known[: known.index(best) + 1] if best in known else [best]:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": kind.lower(), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "tests/support/operations_digest.py"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300
        )
        used, digest = done.stdout.split()
        assert used == kind
        digests.add(digest)
    assert digests == {SAME_EVERYWHERE}
