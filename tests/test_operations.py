from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as TF

from pipelines.augment.operations import apply_operations
from pipelines.policies import Operation

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
    return TF.affine(image, 0.0, shift, 1.0, degrees, mode, fill, center)  # type: ignore[arg-type]


GEOMETRIC: dict[Operation, tuple[Callable[..., torch.Tensor], Sequence[float]]] = {
    Operation.SHEAR_X: (lambda i, m, *how: affine(i, [m, 0.0], [0, 0], *how), np.linspace(-0.3, 0.3, 31)),
    Operation.SHEAR_Y: (lambda i, m, *how: affine(i, [0.0, m], [0, 0], *how), np.linspace(-0.3, 0.3, 31)),
    Operation.TRANSLATE_X: (lambda i, m, *how: affine(i, [0.0, 0.0], [m, 0], *how), [*range(-9, 10), -0.5, 3.7, 200]),
    Operation.TRANSLATE_Y: (lambda i, m, *how: affine(i, [0.0, 0.0], [0, m], *how), [*range(-9, 10), -0.5, 3.7, 200]),
    Operation.ROTATE: (lambda i, m, mode, fill: TF.rotate(i, m, mode, fill=fill), np.linspace(-30, 30, 31)),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small images: threads only cost here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("operation", PIXELWISE, ids=lambda operation: operation.name.lower())
@pytest.mark.parametrize("size", [*SIZES, (2, 9), (1, 1), (224, 224)])
def test_pixelwise_operations_equal_torchvisions(operation: Operation, size: tuple[int, int]) -> None:
    oracle, magnitudes = PIXELWISE[operation]
    images, strengths = cases(magnitudes if size[0] < 100 else magnitudes[::15], size)
    before = images.clone()
    out = batched(images, operation, strengths)
    assert torch.equal(images, before) and out.is_contiguous()
    for image, strength, result in zip(images, strengths, out, strict=True):
        assert torch.equal(result, oracle(image, strength)), strength


@pytest.mark.parametrize("fill", [(0.0, 0.0, 0.0), OCHRE])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("operation", GEOMETRIC, ids=lambda operation: operation.name.lower())
def test_geometric_operations_equal_torchvisions(
    operation: Operation, mode: str, fill: tuple[float, float, float]
) -> None:
    oracle, magnitudes = GEOMETRIC[operation]
    for size in SIZES:
        images, strengths = cases(magnitudes, size, kinds=1)
        out = batched(images, operation, strengths, mode, fill)
        expected = [
            oracle(i, m, mode, list(fill) if any(fill) else None) for i, m in zip(images, strengths, strict=True)
        ]
        assert torch.equal(out, torch.stack(expected)), size


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
    """Draws of all kinds, three a sample, interleaved pixels in: equal to torchvision's one after the other."""
    size = (45, 31)
    rng = np.random.default_rng(count)
    kinds = list(PIXELWISE) + list(GEOMETRIC)
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
        assert torch.equal(apply_operations(images, operations, magnitudes), torch.stack(expected))


def test_no_operations_change_nothing() -> None:
    images = images_of(3, 9, 9)
    out = apply_operations(images, np.zeros((3, 0), np.uint8), np.zeros((3, 0), np.float32))
    assert torch.equal(out, images) and out.data_ptr() != images.data_ptr()
