from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sdpnet.config.options import EmaOptions
from sdpnet.model.sdpnet import SdPNet, create_model
from sdpnet.optim.ema import ModelEma


def disturb(model: nn.Module, seed: int) -> None:
    """What a training step does to parameters and buffers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator).to(value.dtype), alpha=0.1)
            else:
                value.add_(1)


def same(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.fixture
def model() -> SdPNet:
    return create_model("sdpnet_tiny", 10)


def test_it_is_timms_average_of_parameters_and_buffers(model: SdPNet) -> None:
    ours, theirs = ModelEma(model, EmaOptions(0.9, warmup=False)), ModelEmaV3(model, decay=0.9)
    for step in range(5):
        disturb(model, step)
        ours.update(model)
        theirs.update(model)
    same(ours.module, theirs.module)
    assert ours.module.patch_norm.num_batches_tracked == 5


def test_warm_up_against_torchs_average(model: SdPNet) -> None:
    """0.1, 2/11, 3/12, ... and never above the decay that was asked for."""
    ours = ModelEma(model, EmaOptions(0.4))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)
    theirs.update_parameters(model)  # its first update is a copy
    for step, decay in enumerate((0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4)):
        disturb(model, step)
        assert ours.decay == pytest.approx(decay)
        theirs.multi_avg_fn = get_ema_multi_avg_fn(decay)
        theirs.update_parameters(model)
        ours.update(model)
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(ours.module.get_parameter(name), value.detach(), msg=name)


def test_half_precision_weights_are_averaged_in_float32(model: SdPNet) -> None:
    ema, start = ModelEma(model.bfloat16(), EmaOptions(0.999, warmup=False)), model.class_token.detach().double()
    with torch.no_grad():
        model.class_token.fill_(1)
    for _ in range(10):
        ema.update(model)
    assert {v.dtype for v in ema.module.state_dict().values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(ema.module.class_token.double(), 1 + (start - 1) * 0.999**10, rtol=0, atol=1e-6)


def test_the_average_is_a_model_of_its_own(model: SdPNet) -> None:
    ema = ModelEma(model, EmaOptions(0.5))
    assert not ema.module.training and model.training
    assert not any(p.requires_grad for p in ema.module.parameters()) and model.class_token.requires_grad
    before = ema.module(torch.ones(1, 3, 32, 32))
    disturb(model, 0)
    torch.testing.assert_close(ema.module(torch.ones(1, 3, 32, 32)), before)


def test_it_continues_from_its_state(model: SdPNet, tmp_path: Path) -> None:
    ema = ModelEma(model, EmaOptions(0.9))
    disturb(model, 0)
    ema.update(model)
    torch.save(ema.module.state_dict(), tmp_path / "ema.pt")
    again = ModelEma(create_model("sdpnet_tiny", 10), EmaOptions(0.9))
    again.module.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    again.num_updates = ema.num_updates
    disturb(model, 1)
    for average in (ema, again):
        average.update(model)
    assert again.num_updates == 2
    same(again.module, ema.module)
