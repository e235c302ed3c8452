"""The augmentation of the contact sheet: the seed recipe, with the values of configs/sdpnet_xl.yaml."""

from __future__ import annotations

from typing import Final

from sdpnet.pipelines.planning.options import CropOptions, EraseOptions, MixOptions, RandAugmentOptions

__all__ = ["CROP", "ERASE", "IMAGE_SIZE", "MIX", "RANDAUGMENT", "RECIPE"]

IMAGE_SIZE: Final = 224
CROP: Final = CropOptions()
RANDAUGMENT: Final = RandAugmentOptions(policy="randaugment")
ERASE: Final = EraseOptions(probability=0.25)
MIX: Final = MixOptions(mixup_alpha=0.8, cutmix_alpha=1.0)
RECIPE: Final = (
    f"{IMAGE_SIZE} px, random resized crop of {CROP.scale[0]:.0%} to {CROP.scale[1]:.0%} of the area, "
    f"flip {CROP.flip_probability:.0%}, RandAugment ({RANDAUGMENT.num_ops} operations of magnitude "
    f"{RANDAUGMENT.magnitude:g}), erasing {ERASE.probability:.0%}, "
    f"MixUp {MIX.mixup_alpha}, CutMix {MIX.cutmix_alpha}"
)
