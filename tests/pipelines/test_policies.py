from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats
from timm.data import auto_augment
from torchvision.transforms.v2 import RandAugment

from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.planning.draws import derive_seed
from sdpnet.pipelines.planning.policies import Operation, RandAugmentOptions, draw_operations

SIGNIFICANCE = 1e-6  # chance of a false alarm in each statistical test; the draws are fixed, so none is flaky
NUM_SAMPLES = 50_000  # two operations each
KEY = derive_seed(11, 0)

TORCHVISION = {  # in the order of torchvision's table
    "Identity": Operation.IDENTITY,
    "ShearX": Operation.SHEAR_X,
    "ShearY": Operation.SHEAR_Y,
    "TranslateX": Operation.TRANSLATE_X,
    "TranslateY": Operation.TRANSLATE_Y,
    "Rotate": Operation.ROTATE,
    "Brightness": Operation.BRIGHTNESS,
    "Color": Operation.COLOUR,
    "Contrast": Operation.CONTRAST,
    "Sharpness": Operation.SHARPNESS,
    "Posterize": Operation.POSTERIZE,
    "Solarize": Operation.SOLARIZE,
    "AutoContrast": Operation.AUTOCONTRAST,
    "Equalize": Operation.EQUALIZE,
}
TIMM = {
    "AutoContrast": Operation.AUTOCONTRAST,
    "Equalize": Operation.EQUALIZE,
    "Invert": Operation.INVERT,
    "Rotate": Operation.ROTATE,
    "PosterizeIncreasing": Operation.POSTERIZE,
    "SolarizeIncreasing": Operation.SOLARIZE,
    "SolarizeAdd": Operation.SOLARIZE_ADD,
    "ColorIncreasing": Operation.COLOUR,
    "ContrastIncreasing": Operation.CONTRAST,
    "BrightnessIncreasing": Operation.BRIGHTNESS,
    "SharpnessIncreasing": Operation.SHARPNESS,
    "ShearX": Operation.SHEAR_X,
    "ShearY": Operation.SHEAR_Y,
    "TranslateXRel": Operation.TRANSLATE_X,
    "TranslateYRel": Operation.TRANSLATE_Y,
}
ENHANCEMENTS = (Operation.BRIGHTNESS, Operation.COLOUR, Operation.CONTRAST, Operation.SHARPNESS)
SHIFTS = (Operation.TRANSLATE_X, Operation.TRANSLATE_Y)


def draw(options: RandAugmentOptions, count: int = NUM_SAMPLES, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    operations, magnitudes = draw_operations(options, KEY, np.arange(count), size)
    assert operations.dtype == np.uint8 and magnitudes.dtype == np.float32 and operations.shape == magnitudes.shape
    return operations, magnitudes


def test_randaugment_has_torchvisions_magnitudes() -> None:
    space = RandAugment._AUGMENTATION_SPACE
    assert set(space) == set(TORCHVISION)
    for size in (32, 224, 331):
        for index in range(31):
            operations, magnitudes = draw(RandAugmentOptions("randaugment", magnitude=index), 400, size)
            for name, (values, signed) in space.items():
                drawn = magnitudes[operations == TORCHVISION[name]]
                table = values(31, size, size)
                expected = 0.0 if table is None else float(table[index])
                if TORCHVISION[name] in SHIFTS:
                    expected = int(expected)  # as its RandAugment truncates it
                if TORCHVISION[name] == Operation.SOLARIZE:
                    expected *= 255.0
                wanted = sorted({expected, -expected} if signed else {expected})
                # But for the last bit: torch's linspace differs in it from CPU to CPU.
                assert np.unique(drawn) == pytest.approx(wanted, rel=3e-7), (name, index, size)


def test_randaugment_draws_operations_and_signs_evenly() -> None:
    operations, magnitudes = draw(RandAugmentOptions("randaugment", magnitude=10))
    assert stats.chisquare(np.bincount(operations.ravel(), minlength=14)).pvalue > SIGNIFICANCE
    pairs = operations[:, 0].astype(int) * 14 + operations[:, 1]
    assert stats.chisquare(np.bincount(pairs, minlength=196)).pvalue > SIGNIFICANCE
    signed = (operations >= Operation.SHEAR_X) & (operations <= Operation.SHARPNESS)
    assert (magnitudes[~signed & (operations > 0)] >= 0).all()
    for operation in range(Operation.SHEAR_X, Operation.SHARPNESS + 1):
        drawn = magnitudes[operations == operation]
        assert stats.binomtest(int((drawn < 0).sum()), len(drawn), 0.5).pvalue > SIGNIFICANCE


def test_increasing_draws_each_operation_half_the_time() -> None:
    assert set(TIMM) == set(auto_augment._RAND_INCREASING_TRANSFORMS)
    operations, _ = draw(RandAugmentOptions("increasing"))
    counts = np.bincount(operations.ravel(), minlength=16)
    expected = np.full(16, NUM_SAMPLES * 2 * 0.5 / 15)
    expected[Operation.IDENTITY] = NUM_SAMPLES * 2 * 0.5
    assert stats.chisquare(counts, expected).pvalue > SIGNIFICANCE
    applied = (operations > 0).astype(int)
    assert stats.chisquare(np.bincount(applied[:, 0] * 2 + applied[:, 1])).pvalue > SIGNIFICANCE


@pytest.mark.parametrize(("magnitude", "deviation"), [(9.0, 0.5), (5.0, 3.0), (7.0, 0.0)])
def test_increasing_has_timms_magnitudes(magnitude: float, deviation: float) -> None:
    size = 224
    operations, magnitudes = draw(RandAugmentOptions("increasing", magnitude=magnitude, magnitude_std=deviation))
    random.seed(0)  # timm draws from Python's global generator
    for name, operation in TIMM.items():
        level_to_argument = auto_augment.LEVEL_TO_ARG[name]
        ours = magnitudes[operations == operation]
        if level_to_argument is None:
            assert (ours == 0).all()
            continue
        levels = [min(max(random.gauss(magnitude, deviation), 0.0), 10.0) for _ in range(4000)]
        drawn = [level_to_argument(level, {}) for level in levels]
        theirs = np.array([value[0] if isinstance(value, tuple) else value for value in drawn], float)
        theirs = theirs - 1 if operation in ENHANCEMENTS else theirs * size if operation in SHIFTS else theirs
        # float32, then rounded: timm's own last bits must not order values that are equal
        ours, theirs = np.round(ours.astype(float), 4), np.round(theirs.astype(np.float32).astype(float), 4)
        assert stats.ks_2samp(ours, theirs).pvalue > SIGNIFICANCE, name
        assert set(np.unique(np.sign(ours))) == set(np.unique(np.sign(theirs))), name


def test_three_is_one_of_three_then_a_jitter_in_random_order() -> None:
    operations, magnitudes = draw(RandAugmentOptions("three"))
    assert operations.shape == (NUM_SAMPLES, 4)
    kinds, counts = np.unique(operations[:, 0], return_counts=True)
    assert kinds.tolist() == sorted([Operation.GREYSCALE, Operation.SOLARIZE, Operation.GAUSSIAN_BLUR])
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE
    first = magnitudes[:, 0]
    assert (first[operations[:, 0] == Operation.SOLARIZE] == 128).all()
    blurs = first[operations[:, 0] == Operation.GAUSSIAN_BLUR]
    assert stats.kstest(blurs, stats.uniform(0.1, 1.9).cdf).pvalue > SIGNIFICANCE
    orders, counts = np.unique(operations[:, 1:], axis=0, return_counts=True)
    jitter = {int(Operation.BRIGHTNESS), int(Operation.CONTRAST), int(Operation.COLOUR)}
    assert len(orders) == 6 and all(set(order.tolist()) == jitter for order in orders)
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE
    for k in (1, 2, 3):
        assert stats.kstest(magnitudes[:, k], stats.uniform(-0.3, 0.6).cdf).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("policy", ["none", "randaugment", "increasing", "three"])
def test_a_samples_draw_is_its_own(policy: str) -> None:
    options = RandAugmentOptions(policy)  # type: ignore[arg-type]
    operations, magnitudes = draw(options, 100)
    some = np.array([97, 3, 41])
    again = draw_operations(options, KEY, some, 224)
    assert np.array_equal(again[0], operations[some]) and np.array_equal(again[1], magnitudes[some])
    other = draw_operations(options, KEY + 1, np.arange(100), 224)
    assert policy == "none" or not np.array_equal(other[1], magnitudes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "trivial"}, r"augment\.randaugment\.policy = 'trivial': must be one of none, randaugment"),
        ({"num_ops": 0}, r"augment\.randaugment\.num_ops = 0: must be 1 to 8"),
        ({"policy": "randaugment", "magnitude": 31}, r"magnitude = 31: must be 0 to 30 with policy randaugment"),
        ({"policy": "randaugment", "magnitude": 9.5}, r"magnitude = 9\.5: must be a whole number"),
        ({"policy": "increasing", "magnitude": 11}, r"magnitude = 11: must be 0 to 10 with policy increasing"),
        ({"policy": "increasing", "magnitude": -1}, r"magnitude = -1: must be 0 to 10 with policy increasing"),
        ({"policy": "increasing", "magnitude": float("nan")}, r"magnitude = nan: must be 0 to 10"),
        ({"magnitude_std": -0.5}, r"magnitude_std = -0\.5: must be 0 or more"),
        ({"interpolation": "cubic"}, r"interpolation = 'cubic': must be nearest or bilinear"),
        ({"fill": (0.0, 256.0, 0.0)}, r"fill = \(0\.0, 256\.0, 0\.0\): must be levels from 0 to 255"),
    ],
)
def test_wrong_settings_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        RandAugmentOptions(**changes)
    assert "\n" not in str(caught.value)
