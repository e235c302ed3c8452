"""The options of the random decisions: crops, erasing, mixing, operations, sampling. Without NumPy, which is slow to
import: a command reads them before it does anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from sdpnet.pipelines.errors import require

if TYPE_CHECKING:
    from sdpnet.pipelines.planning.sampling import SamplingRequest

__all__ = [
    "ERASE_MODES",
    "MAX_LEVEL",
    "MAX_OPS",
    "MAX_REPEATS",
    "NUM_BINS",
    "CropOptions",
    "EraseOptions",
    "MixOptions",
    "Order",
    "RandAugmentOptions",
    "SamplingOptions",
]

Order = Literal["random", "blocks", "sequential"]
ERASE_MODES: Final = ("constant", "colour", "pixel")
NUM_BINS: Final = 31  # torchvision's num_magnitude_bins
MAX_LEVEL: Final = 10  # timm's
MAX_OPS: Final = 8
MAX_REPEATS: Final = 1024


@dataclass(frozen=True)
class CropOptions:
    """Random resized crop (Szegedy et al., 2015; torchvision's RandomResizedCrop), for training only.

    Attributes:
        scale: The least and the greatest share of the image's area that a crop covers.
        ratio: The least and the greatest ratio of a crop's width to its height.
        flip_probability: The probability that a crop is mirrored left-right.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5


@dataclass(frozen=True)
class EraseOptions:
    """Random erasing (Zhong et al., 2017; torchvision's RandomErasing), after normalisation.

    Attributes:
        probability: The probability that a box of an image is erased; 0 is off.
        scale: The least and the greatest share of the image's area that a box covers.
        ratio: The least and the greatest ratio of a box's width to its height.
        mode: What a box is filled with. `constant`: 0, which is the mean colour. `colour`: one normally distributed
            colour for each box. `pixel`: normal noise. (timm's "const", "rand" and "pixel".)
    """

    probability: float = 0.0
    scale: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 3.3)
    mode: Literal["constant", "colour", "pixel"] = "constant"


@dataclass(frozen=True)
class MixOptions:
    """MixUp (Zhang et al., 2017) and CutMix (Yun et al., 2019), of pairs of images within a batch.

    Attributes:
        mixup_alpha: The parameter of the Beta distribution of MixUp's weights; 0 turns MixUp off.
        cutmix_alpha: The parameter of the Beta distribution of CutMix's areas; 0 turns CutMix off.
        probability: The probability that an image is mixed (timm's `Mixup`, mode "elem").
        switch_probability: Where both are on, the probability that a mixed image is mixed by CutMix.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5

    @property
    def enabled(self) -> bool:
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass(frozen=True)
class RandAugmentOptions:
    """Operations on images such as shears, rotations and changes of colour, drawn for each image anew.

    Attributes:
        policy: `none`: no operations. `randaugment`: torchvision's RandAugment (Cubuk et al., 2020) with its 14
            operations. `increasing`: timm's `rand-m9-mstd0.5-inc1` with 15 operations that all grow with the magnitude,
            each applied with probability 0.5. `three`: 3-Augment (Touvron et al., 2022, "DeiT III"): greyscale,
            solarize or blur, then a colour jitter of 0.3; it has no settings.
        num_ops: Operations drawn for each image.
        magnitude: How strong the operations are: a whole number from 0 to 30 for `randaugment`, any number from 0 to 10
            for `increasing`.
        magnitude_std: For `increasing` only: the standard deviation of the magnitude, which is normally distributed.
        interpolation: How shears, shifts and rotations compute pixels between the given ones.
        fill: The RGB levels of what shears, shifts and rotations leave uncovered.
    """

    policy: Literal["none", "randaugment", "increasing", "three"] = "none"
    num_ops: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        section, limit = "augment.randaugment", NUM_BINS - 1 if self.policy == "randaugment" else MAX_LEVEL
        policies = ("none", "randaugment", "increasing", "three")
        require(self.policy in policies, f"{section}.policy", self.policy, f"one of {', '.join(policies)}")
        require(1 <= self.num_ops <= MAX_OPS, f"{section}.num_ops", self.num_ops, f"1 to {MAX_OPS}")
        require(
            0 <= self.magnitude <= limit or self.policy in ("none", "three"),
            f"{section}.magnitude",
            self.magnitude,
            f"0 to {limit} with policy {self.policy}",
        )
        whole = float(self.magnitude).is_integer() or self.policy != "randaugment"
        require(whole, f"{section}.magnitude", self.magnitude, "a whole number with policy randaugment")
        require(0 <= self.magnitude_std < float("inf"), f"{section}.magnitude_std", self.magnitude_std, "0 or more")
        modes = ("nearest", "bilinear")
        require(self.interpolation in modes, f"{section}.interpolation", self.interpolation, " or ".join(modes))
        require(all(0 <= level <= 255 for level in self.fill), f"{section}.fill", self.fill, "levels from 0 to 255")

    @property
    def enabled(self) -> bool:
        return self.policy != "none"


@dataclass(frozen=True)
class SamplingOptions:
    """Section `data.sampling`: the samples of an epoch, how often each of them is used, and their labels.

    Attributes:
        classes: The names of the classes that are used, of training and evaluation; an empty list is all of them. The
            name of a .txt file stands for the names in its lines. The numbers of the classes do not change.
        exclude: The names of classes that are not used, in the same form.
        subset: The share of each class's training samples that is used. It is the same for any training seed, and a
            smaller share is a part of a larger one. Or the path of an .npy file, or of a .txt file with one number in
            each line, with the numbers of the samples that are used.
        subset_seed: The seed of the share that is drawn.
        weights: Draws training samples with replacement, as many as there are, in proportion to weights: `balanced`
            makes all classes equally likely; otherwise the path of an .npy file with one weight for each sample of the
            split. Empty is off: each sample is used once in an epoch.
        repeats: How many times each training sample is used in a row, each time with other crops and other draws
            (repeated augmentation: Hoffer et al., 2020). An epoch keeps its length, so that it has fewer different
            samples.
        labels: The path of an .npy file with the labels of the training split, one row for each sample, instead of its
            own. Whole numbers are classes; rows of numbers are targets of several classes or for a regression.
        val_labels: The same for the evaluation split.
    """

    classes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    subset: float | str = 1.0
    subset_seed: int = 0
    weights: str = ""
    repeats: int = 1
    labels: str = ""
    val_labels: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.subset, str):
            require(0 < self.subset <= 1, "data.sampling.subset", self.subset, "in (0, 1], or a path")
        require(1 <= self.repeats <= MAX_REPEATS, "data.sampling.repeats", self.repeats, f"1 to {MAX_REPEATS:,}")

    def request(self, *, train: bool) -> SamplingRequest:
        """What is asked of a split. An evaluation uses only `classes`, `exclude` and `val_labels`."""
        from sdpnet.pipelines.planning.sampling import SamplingRequest  # needs NumPy

        labels = self.labels if train else self.val_labels
        return SamplingRequest(
            classes=self.classes,
            exclude=self.exclude,
            subset=self.subset if train else 1.0,
            subset_seed=self.subset_seed,
            weights=(self.weights or None) if train else None,
            repeats=self.repeats if train else 1,
            labels=labels or None,
        )
