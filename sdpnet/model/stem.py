"""The patch embedding: one convolution over each patch, or an overlapping convolutional stem."""

from __future__ import annotations

from torch import nn

from sdpnet.model.options import Stem

__all__ = ["Stem", "make_stem", "stem_channels"]


def make_stem(stem: Stem, dim: int, patch_size: int) -> nn.Module:
    """Makes the module from images (B, 3, H, W) to patches (B, dim, H / patch_size, W / patch_size), without a norm.

    `patch` is the convolution of ViT with stride `patch_size`. `conv` is the stem of Xiao et al., 2021 ("Early
    convolutions help transformers see better"): 3 x 3 convolutions of stride 2, each followed by batch norm and ReLU,
    then a 1 x 1 convolution. Neighbouring patches share pixels. The sides of images that are not a multiple of the
    patch size are rounded down by `patch` and up by `conv`.
    """
    if stem == "patch":
        return nn.Conv2d(3, dim, patch_size, stride=patch_size)
    layers: list[nn.Module] = []
    inputs = 3
    for channels in stem_channels(dim, patch_size):
        # Batch norm subtracts the mean, so that a bias before it would have no effect.
        layers += [nn.Conv2d(inputs, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers, nn.Conv2d(inputs, dim, 1))


def stem_channels(dim: int, patch_size: int) -> list[int]:
    """The channels of the 3 x 3 convolutions of `conv`: they double with each halving of the image, up to `dim`.

    For 384 channels and patches of 16 pixels these are 48, 96, 192, 384, as in the paper's ViT-C of 4 GFLOP.
    """
    number = patch_size.bit_length() - 1
    return [dim >> (number - 1 - layer) for layer in range(number)]
