"""Policies of per-sample augmentation: which operations an image gets, in which order and how strongly, as data.

draw_operations(options, key, sample_ids, image_size) -> operations (B, K), magnitudes (B, K)
"""

from __future__ import annotations

import itertools
from enum import IntEnum
from typing import Final

import numpy as np

from sdpnet.pipelines.planning.draws import uniforms
from sdpnet.pipelines.planning.options import MAX_LEVEL, NUM_BINS, RandAugmentOptions

__all__ = ["Operation", "RandAugmentOptions", "draw_operations", "in_words"]


class Operation(IntEnum):
    """What can be done to an image, and the unit of its magnitude. Numbers are part of plans: never renumber."""

    IDENTITY = 0
    SHEAR_X = 1  # columns a row
    SHEAR_Y = 2  # rows a column
    TRANSLATE_X = 3  # pixels to the right
    TRANSLATE_Y = 4  # pixels down
    ROTATE = 5  # degrees, counter-clockwise
    BRIGHTNESS = 6  # factor - 1; so the next three
    COLOUR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10  # bits that stay, 0 to 8
    SOLARIZE = 11  # the lowest level that is inverted, 0 to 256
    AUTOCONTRAST = 12
    EQUALIZE = 13
    INVERT = 14
    SOLARIZE_ADD = 15  # levels added to what is below 128, 0 to 128
    GREYSCALE = 16
    GAUSSIAN_BLUR = 17  # standard deviation in pixels, above 0 to 2


# Of the magnitude {m}, and of {factor} = 1 + {m}. ASCII: the font of `sdpnet sheet` has little else.
_WORDS: Final = {
    Operation.IDENTITY: "identity",
    Operation.SHEAR_X: "shear x {m:+.3f} columns a row",
    Operation.SHEAR_Y: "shear y {m:+.3f} rows a column",
    Operation.TRANSLATE_X: "translate x {m:+.1f} px",
    Operation.TRANSLATE_Y: "translate y {m:+.1f} px",
    Operation.ROTATE: "rotate {m:+.1f} deg",
    Operation.BRIGHTNESS: "brightness times {factor:.2f}",
    Operation.COLOUR: "colour times {factor:.2f}",
    Operation.CONTRAST: "contrast times {factor:.2f}",
    Operation.SHARPNESS: "sharpness times {factor:.2f}",
    Operation.POSTERIZE: "posterize, bits: {m:.0f}",
    Operation.SOLARIZE: "solarize from level {m:.4g}",
    Operation.AUTOCONTRAST: "autocontrast",
    Operation.EQUALIZE: "equalize",
    Operation.INVERT: "invert",
    Operation.SOLARIZE_ADD: "solarize-add {m:.0f} levels below 128",
    Operation.GREYSCALE: "greyscale",
    Operation.GAUSSIAN_BLUR: "blur, sigma {m:.2f} px",
}


def in_words(operation: int, magnitude: float) -> str:
    """What an operation of this magnitude does, for people."""
    return _WORDS[Operation(operation)].format(m=magnitude, factor=1 + magnitude)


_DRAWS_PER_OP: Final = 5

_RANDAUGMENT: Final = np.arange(14, dtype=np.uint8)  # torchvision's: IDENTITY to EQUALIZE
_INCREASING: Final = np.array([op for op in Operation if Operation.SHEAR_X <= op <= Operation.SOLARIZE_ADD], np.uint8)
_THREE: Final = np.array([Operation.GREYSCALE, Operation.SOLARIZE, Operation.GAUSSIAN_BLUR], np.uint8)
_JITTER: Final = np.array([Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOUR], np.uint8)
_JITTER_ORDERS: Final = np.array(list(itertools.permutations(range(3))))


def draw_operations(
    options: RandAugmentOptions, key: int, sample_ids: np.ndarray, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The operations of each sample, in order: uint8 (B, K) of `Operation`, and their magnitudes, float32 (B, K).

    K is `num_ops`; 4 for "three", 0 for "none". `image_size` (pixels a side) is what shifts are relative to.
    """
    if options.policy == "none":
        return np.zeros((len(sample_ids), 0), np.uint8), np.zeros((len(sample_ids), 0), np.float32)
    if options.policy == "three":
        return _three(uniforms(key, sample_ids, 6))
    u = uniforms(key, sample_ids, _DRAWS_PER_OP * options.num_ops).reshape(len(sample_ids), -1, _DRAWS_PER_OP)
    sign = np.where(u[..., 1] < 0.5, -1.0, 1.0)
    if options.policy == "randaugment":
        choice = (u[..., 0] * len(_RANDAUGMENT)).astype(np.int64)
        strength = _torchvision_magnitudes(int(options.magnitude), image_size)[choice]
        signed = (choice >= Operation.SHEAR_X) & (choice <= Operation.SHARPNESS)
        return _RANDAUGMENT[choice], np.where(signed, sign * strength, strength).astype(np.float32)
    choice = (u[..., 0] * len(_INCREASING)).astype(np.int64)
    normal = np.sqrt(-2 * np.log(1 - u[..., 3])) * np.cos(2 * np.pi * u[..., 4])  # Box & Muller, 1958
    level = np.clip(options.magnitude + options.magnitude_std * normal, 0, MAX_LEVEL) / MAX_LEVEL
    magnitudes = np.take_along_axis(_timm_magnitudes(level, sign, image_size), choice[None], axis=0)[0]
    applied = u[..., 2] < 0.5
    return np.where(applied, _INCREASING[choice], 0).astype(np.uint8), np.where(applied, magnitudes, 0).astype(
        np.float32
    )


def _torchvision_magnitudes(index: int, image_size: int) -> np.ndarray:
    """float64 (14,): the magnitude of bin `index` for each operation; the signed ones positive."""

    def linspace(start: float, stop: float) -> float:
        """torch.linspace(start, stop, 31)[index]: float32 steps from the nearer end, each value rounded once."""
        first, last = np.float32(start), np.float32(stop)
        step = float((last - first) / np.float32(NUM_BINS - 1))
        up, down = float(first) + step * index, float(last) - step * (NUM_BINS - 1 - index)
        return float(np.float32(up if index < NUM_BINS // 2 else down))

    values = np.zeros(len(_RANDAUGMENT))
    values[[Operation.SHEAR_X, Operation.SHEAR_Y]] = linspace(0, 0.3)
    values[[Operation.TRANSLATE_X, Operation.TRANSLATE_Y]] = int(linspace(0, 150.0 / 331.0 * image_size))
    values[Operation.ROTATE] = linspace(0, 30)
    values[[Operation.BRIGHTNESS, Operation.COLOUR, Operation.CONTRAST, Operation.SHARPNESS]] = linspace(0, 0.9)
    values[Operation.POSTERIZE] = np.rint(8 - index / ((NUM_BINS - 1) / 4))
    values[Operation.SOLARIZE] = 255.0 * linspace(1, 0)
    return values


def _timm_magnitudes(level: np.ndarray, sign: np.ndarray, image_size: int) -> np.ndarray:
    """float64 (15, *level.shape): the magnitudes of `_INCREASING` at `level` in [0, 1]."""
    zero = np.zeros_like(level)
    shear, shift, angle = 0.3 * level * sign, 0.45 * level * sign * image_size, 30 * level * sign
    enhance = np.maximum(0.9 * level * sign, -0.9)
    by_operation = {
        Operation.SHEAR_X: shear,
        Operation.SHEAR_Y: shear,
        Operation.TRANSLATE_X: shift,
        Operation.TRANSLATE_Y: shift,
        Operation.ROTATE: angle,
        Operation.BRIGHTNESS: enhance,
        Operation.COLOUR: enhance,
        Operation.CONTRAST: enhance,
        Operation.SHARPNESS: enhance,
        Operation.POSTERIZE: 4 - np.floor(4 * level),
        Operation.SOLARIZE: 256 - np.floor(256 * level),
        Operation.SOLARIZE_ADD: np.floor(110 * level),
    }
    return np.stack([by_operation.get(Operation(int(op)), zero) for op in _INCREASING])


def _three(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    choice = (u[:, 0] * len(_THREE)).astype(np.int64)
    magnitudes = np.zeros((len(u), 4))
    magnitudes[:, 0] = np.choose(choice, [0.0, 128.0, 0.1 + 1.9 * u[:, 1]])
    order = _JITTER_ORDERS[(u[:, 2] * len(_JITTER_ORDERS)).astype(np.int64)]
    magnitudes[:, 1:] = 0.6 * u[:, 3:6] - 0.3
    return np.concatenate([_THREE[choice][:, None], _JITTER[order]], axis=1), magnitudes.astype(np.float32)
