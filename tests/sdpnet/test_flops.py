"""The arithmetic of models, against torch's own counter and published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm

from sdpnet.model.flops import conv_block_macs, counted_macs, forward_macs
from sdpnet.model.sdpnet import MODELS, SdPNet


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image_size", [64, 224])
def test_it_is_what_torch_counts(name: str, image_size: int) -> None:
    options = MODELS[name]
    assert forward_macs(options, image_size) == counted_macs(lambda: SdPNet(options), image_size)
    without = replace(options, conv_blocks=0)
    conv_blocks = forward_macs(options, image_size) - counted_macs(lambda: SdPNet(without), image_size)
    assert conv_block_macs(options, image_size) == conv_blocks


@pytest.mark.parametrize(("name", "gmac"), [("sdpnet_l", 11.1), ("sdpnet_xl", 15.6), ("sdpnet_xxl", 17.4)])
def test_the_designs_figures(name: str, gmac: float) -> None:
    assert forward_macs(MODELS[name], 224) / 1e9 == pytest.approx(gmac, abs=0.05)


@pytest.mark.parametrize(("name", "gmac"), [("convnext_base", 15.4), ("vit_base_patch16_224", 17.5)])
def test_published_figures_of_others(name: str, gmac: float) -> None:
    """ConvNeXt-B: Liu et al., 2022, table 1; ViT-B/16: DeiT-B's 17.5, Touvron et al., 2021 (17.6 elsewhere)."""
    assert counted_macs(lambda: timm.create_model(name), 224) / 1e9 == pytest.approx(gmac, abs=0.11)
