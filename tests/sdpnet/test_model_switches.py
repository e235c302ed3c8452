"""The switches of a modern recipe: overlapping stem, norms of queries and keys, patch dropout; alone and in a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import PatchDropout
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from trainings import arguments, metrics, same_run, stop_after

from sdpnet.checkpoints.model import ModelCard, load_model
from sdpnet.commands.export import export
from sdpnet.config.load import load_config
from sdpnet.config.options import OptimOptions
from sdpnet.config.resolution import patch_dropout_of
from sdpnet.model.flops import counted_macs, forward_macs
from sdpnet.model.patch_dropout import drop_patches, kept_patches
from sdpnet.model.sdpnet import SdPNet, create_model
from sdpnet.model.stem import make_stem, stem_channels
from sdpnet.optim.optimizer import make_optimizer
from sdpnet.pipelines.errors import UserError
from sdpnet.train import main

SWITCHES: dict[str, dict[str, Any]] = {
    "stem": {"stem": "conv"},
    "qk_norm": {"qk_norm": True},
    "patch_dropout": {"patch_dropout": 0.5},
}
ALL = {name: value for switch in SWITCHES.values() for name, value in switch.items()}
SETTINGS = [f"model.{name}={str(value).lower()}" for name, value in ALL.items()]


def tiny(**overrides: Any) -> SdPNet:
    torch.manual_seed(0)
    return create_model("sdpnet_tiny", num_classes=7, **overrides)


@pytest.mark.parametrize("switch", SWITCHES)
def test_off_by_default(switch: str) -> None:
    """A switch that is off leaves the parameters, their names and their initial values as they are."""
    (name, _), plain = next(iter(SWITCHES[switch].items())), tiny().state_dict()
    off = tiny(**{name: getattr(tiny().options, name)}).state_dict()
    assert list(off) == list(plain) and all(torch.equal(off[key], plain[key]) for key in plain)
    assert not any(word in key for key in plain for word in ("q_norm", "k_norm", "patch.0"))


@pytest.mark.parametrize("position", ["none", "learned", "rope"])
def test_all_together_train_compile_and_agree_across_layouts(position: str) -> None:
    model, images = tiny(position=position, **ALL), torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        model(images.contiguous(memory_format=torch.channels_last)).float().logsumexp(1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        plain = model(images)
        assert torch.allclose(torch.compile(model, backend="aot_eager", fullgraph=True)(images), plain, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(model(images).float(), plain, atol=0.05)


# ---- the stem


@pytest.mark.parametrize(("dim", "patch_size"), [(384, 16), (64, 4), (32, 2)])
def test_the_stem_is_timms(dim: int, patch_size: int) -> None:
    torch.manual_seed(0)
    ours, channels = make_stem("conv", dim, patch_size).double(), stem_channels(dim, patch_size)
    depth = len(channels)
    shape = {"kernel_size": (*(3,) * depth, 1), "stride": (*(2,) * depth, 1), "channels": (*channels, dim)}
    theirs = ConvStem(depth=depth + 1, **shape).double()
    state = theirs.state_dict()
    assert [value.shape for value in ours.state_dict().values()] == [value.shape for value in state.values()]
    theirs.load_state_dict(dict(zip(state, ours.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    for train in (True, False):
        expected = theirs.train(train)(images)
        assert torch.allclose(ours.train(train)(images), expected, atol=1e-12)
        assert expected.shape == (2, dim, 32 // patch_size, 48 // patch_size)


def test_the_stems_channels_are_the_papers() -> None:
    """Xiao et al., 2021, table 5: ViT-C of 1 and 4 GFLOP, with 192 and 384 channels."""
    assert stem_channels(192, 16) == [24, 48, 96, 192]
    assert stem_channels(384, 16) == [48, 96, 192, 384]


def test_the_stem_is_the_lowest_layer_and_not_muons() -> None:
    model = tiny(**ALL, conv_blocks=1, transformer_blocks=1)
    optimizer = make_optimizer(model, OptimOptions(name="muon", layer_decay=0.5, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if names[id(parameter)].startswith("patch."):
                assert group["lr_scale"] == 0.5**3 and "momentum" not in group
                assert (group["weight_decay"] > 0) == (parameter.ndim > 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stem": "convs"}, r"model\.stem = 'convs': did you mean 'conv'"),
        ({"stem": "conv", "patch_size": 12}, r"model\.patch_size = 12: must be a power of 2, from 2, for model\.stem"),
        ({"stem": "conv", "patch_size": 1}, r"model\.patch_size = 1: must be a power of 2"),
        ({"stem": "conv", "dim": 4, "heads": 1, "patch_size": 16}, r"model\.dim = 4: must be a multiple of 8 for"),
        ({"qk_norm": 1}, r"model\.qk_norm = 1: must be true or false"),
        ({"patch_dropout": 1.0}, r"model\.patch_dropout = 1\.0: must be in \[0, 1\)"),
    ],
)
def test_wrong_values_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("sdpnet_tiny", **settings)


# ---- norms of queries and keys


def test_qk_norm_is_timms() -> None:
    model = tiny(qk_norm=True).double()
    block = model.transformer_blocks[0]
    for norm in (block.q_norm, block.k_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    theirs = Attention(128, 4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm).double()
    state = {name: value for name, value in block.state_dict().items() if name in theirs.state_dict()}
    theirs.load_state_dict(state)
    x = torch.randn(2, 9, 128, dtype=torch.float64)
    with torch.no_grad():
        theirs.q_norm.eps = theirs.k_norm.eps = block.q_norm.eps
        assert torch.allclose(block.attention(x, None), theirs(x), atol=1e-12)


def test_qk_norm_bounds_the_logits() -> None:
    """However large the weights are, a query times a key is at most the width of a head."""
    block = tiny(qk_norm=True).transformer_blocks[0]
    nn.init.normal_(block.qkv.weight, std=100)
    x = torch.randn(2, 9, 128)
    with torch.no_grad():
        q, k, _ = block.qkv(x).view(2, 9, 3, 4, 32).permute(2, 0, 3, 1, 4)
        assert (block.q_norm(q) @ block.k_norm(k).mT).abs().max() <= 32.01 < (q @ k.mT).abs().max()


# ---- patch dropout


def tokens_and_kept(rate: float, rotary: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Tokens (500, 3 + 20, 2) that hold their own number, those that remain, and the rotary embedding of these."""
    x = torch.arange(23.0).view(1, 23, 1).expand(500, 23, 2)
    kept, turned = drop_patches(x, rotary, 3, rate)
    return x, kept, turned


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.95, 0.99])
def test_the_prefix_and_as_many_patches_as_in_timm_remain_in_their_order(rate: float) -> None:
    x, kept, _ = tokens_and_kept(rate)
    theirs = PatchDropout(rate, num_prefix_tokens=3, ordered=True)(x)
    assert kept.shape == theirs.shape and kept.shape[1] == 3 + kept_patches(20, rate)
    assert torch.equal(kept[:, :3], x[:, :3])
    numbers = kept[..., 0]
    assert (numbers.diff(dim=1) > 0).all()  # in their order, and each once
    counts = torch.bincount(numbers[:, 3:].long().flatten(), minlength=23)[3:]
    share = kept_patches(20, rate) / 20
    assert ((counts / 500 - share).abs() < 5 * math.sqrt(share * (1 - share) / 500)).all()
    assert len(numbers.unique(dim=0)) > 15  # each image has its own


def test_rotary_embeddings_go_with_their_patches() -> None:
    rotary = torch.arange(23.0).view(1, 23, 1).expand(2, 23, 8)
    _, kept, turned = tokens_and_kept(0.5, rotary)
    assert turned.shape == (2, 500, 1, 13, 8)
    assert torch.equal(turned[:, :, 0, :, 0], kept[..., 0].expand(2, -1, -1))


@pytest.mark.parametrize("position", ["none", "rope"])
def test_a_block_gives_what_it_gives_for_each_image_alone(position: str) -> None:
    model = tiny(position=position, patch_dropout=0.5).double()
    x, rotary = model.encoder_input(torch.randn(3, 128, 4, 4, dtype=torch.float64))
    kept, turned = drop_patches(x, rotary, 5, 0.5)
    block = model.transformer_blocks[0].eval()
    with torch.no_grad():
        together = block(kept, turned)
        for image in range(3):
            same = (x[image, None] == kept[image, :, None]).all(-1)
            numbers = same.int().argmax(dim=1)
            alone = block(x[image : image + 1, numbers], None if rotary is None else rotary[:, numbers])
            assert torch.allclose(together[image], alone[0], atol=1e-12)


def test_only_the_encoder_in_training_gets_fewer_patches() -> None:
    model, images = tiny(patch_dropout=0.75), torch.randn(2, 3, 64, 64)
    assert model.tokens(images).shape[1] == 1 + 4 + 16
    assert model.eval().tokens(images).shape[1] == 1 + 4 + 64
    model.train().patch_dropout = 0.0
    assert model.tokens(images).shape[1] == 1 + 4 + 64


def test_checkpointing_draws_the_same_patches() -> None:
    images, gradients = torch.randn(4, 3, 32, 32), []
    for checkpointing in (False, True):
        model = tiny(position="rope", **ALL)
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        model(images).logsumexp(1).mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# ---- operation counts


@pytest.mark.parametrize(("name", "size"), [("sdpnet_tiny", 64), ("sdpnet_xl", 224)])
def test_macs_of_the_switches_are_what_torch_counts(name: str, size: int) -> None:
    with torch.device("meta"):
        options = create_model(name, **ALL).options
        assert forward_macs(options, size) == counted_macs(lambda: SdPNet(options), size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            SdPNet(options).train()(torch.empty(2, 3, size, size))
    assert 2 * forward_macs(options, size, 0.5) == counter.get_total_flops() // 2


# ---- in a run


def test_the_schedule_of_patch_dropout() -> None:
    config = load_config("debug", ["model.patch_dropout=0.4", "train.epochs=5", "train.full_patch_epochs=2"])
    assert [patch_dropout_of(epoch, config) for epoch in range(5)] == [0.4, 0.4, 0.4, 0, 0]
    always = load_config("debug", ["model.patch_dropout=0.4", "train.epochs=2"])
    assert [patch_dropout_of(epoch, always) for epoch in range(2)] == [0.4, 0.4]
    with pytest.raises(UserError, match=r"train\.full_patch_epochs = 3: must be 0 to train\.epochs \(2\)"):
        load_config("debug", ["train.epochs=2", "train.full_patch_epochs=3"])


@pytest.mark.usefixtures("one_thread")
def test_a_run_with_all_of_them_resumes_to_the_bit(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*SETTINGS, "model.position=rope", "train.full_patch_epochs=1", "data.image_size=32"]
    settings.append("model.patch_size=8")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments(shard_set, whole, *settings)) == 0
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        assert main(arguments(shard_set, stopped, *settings)) == 130
    assert main(["--resume", "--out", str(stopped)]) == 0
    same_run(whole, stopped)
    off = tmp_path / "off"
    assert main(arguments(shard_set, off, *settings, "train.full_patch_epochs=2")) == 0
    losses = [[line["train_loss"] for line in metrics(run) if "train_loss" in line] for run in (whole, off)]
    assert losses[0][0] != losses[1][0]  # in the first epoch patches were dropped
    model, card = load_model(whole)
    assert card.model == model.options and card.model.stem == "conv" and card.model.qk_norm
    assert card.model.patch_dropout == 0.5


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_exported_with_all_of_them(format: Any, tmp_path: Path) -> None:
    if format == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    model = tiny(**ALL, position="rope", conv_blocks=1, transformer_blocks=1)
    model(torch.randn(8, 3, 32, 32))
    card = ModelCard(model.options, tuple("abcdefg"), 32, 0.9, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), {})
    assert export(model.eval(), card, tmp_path / "file", format, 32) < 1e-4
