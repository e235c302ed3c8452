"""The models as timm and torch.hub give them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import sdpnet.model.timm_models  # noqa: F401 (it registers them)
from sdpnet.checkpoints.model import ModelCard, save_model
from sdpnet.model.sdpnet import SdPNet, create_model, create_model_options
from sdpnet.pipelines.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"dim": 32, "heads": 4, "head_hidden": 24, "patch_size": 8}  # sdpnet_l's depth, and quick
IMAGES = torch.randn(2, 3, 32, 32)


def saved(directory: Path, **overrides: object) -> SdPNet:
    torch.manual_seed(0)
    model = create_model("sdpnet_l", **{"num_classes": 7, **SMALL, **overrides})
    model(IMAGES)
    names = tuple(f"class{number}" for number in range(model.options.num_classes))
    save_model(directory, model, ModelCard(model.options, names, 32, 0.875, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {}))
    return model.eval()


@pytest.mark.parametrize("name", ["sdpnet_tiny", "sdpnet_l", "sdpnet_xl", "sdpnet_xxl"])
def test_parameters_are_ours(name: str) -> None:
    assert timm.is_model(name)
    options = {"num_classes": 10, "position": "learned", "layer_scale": 1e-4, "final_norm": True}
    with torch.device("meta"):
        theirs, ours = timm.create_model(name, **options), create_model(name, **options)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert theirs.options == ours.options


def test_loads_a_runs_weights(tmp_path: Path) -> None:
    ours = saved(tmp_path, position="rope")
    path = str(tmp_path / "model.safetensors")
    model = timm.create_model("sdpnet_l", checkpoint_path=path, num_classes=7, position="rope", **SMALL).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), ours(IMAGES))
        tokens = model.forward_features(IMAGES)
        assert tokens.shape == (2, 1 + 4 + 16, model.num_features)
        assert torch.equal(model.forward_head(tokens), ours(IMAGES))
        hidden = model.forward_head(tokens, pre_logits=True)
        assert hidden.shape == (2, model.head_hidden_size)
        model.reset_classifier(0)
        assert torch.equal(model(IMAGES), hidden) and model.num_classes == 0
        model.reset_classifier(3, "token")
        assert model(IMAGES).shape == (2, 3) and model.get_classifier().out_features == model.options.num_classes == 3
        features = timm.create_model("sdpnet_l", num_classes=0, **SMALL)
        assert features(IMAGES).shape == (2, 24)


def test_what_timms_tools_read() -> None:
    model = timm.create_model("sdpnet_l", drop_rate=0.1, drop_path_rate=0.2, position="learned", **SMALL)
    assert (model.options.dropout, model.options.drop_path) == (0.1, 0.2)
    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.875
    assert config["mean"] == (0.485, 0.456, 0.406) and config["std"] == (0.229, 0.224, 0.225)
    model.set_grad_checkpointing()
    assert model.checkpointing
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(model.pretrained_cfg["first_conv"]) is model.patch
    free = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())[0]["params"]
    assert {id(p) for p in (model.class_token, model.registers, model.position_embedding)} <= {id(p) for p in free}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    one_of_each = [model.patch, *(block.pointwise for block in model.conv_blocks)]
    one_of_each += [*(block.proj for block in model.transformer_blocks), model.get_classifier()]
    assert [scales[id(layer.weight)] for layer in one_of_each] == [0.5 ** (13 - depth) for depth in range(14)]


def by_hooks(model: SdPNet, blocks: list[str]) -> list[torch.Tensor]:
    """What these blocks give, patches alone: (B, dim, 4, 4)."""
    found: dict[str, torch.Tensor] = {}
    for name in blocks:
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: found.update({name: args[2]}))
    with torch.no_grad():
        model(IMAGES)
    return [x if x.ndim == 4 else x[:, 5:].mT.unflatten(2, (4, 4)) for x in (found[name] for name in blocks)]


@pytest.mark.parametrize(
    ("indices", "blocks"),
    [
        (None, ["transformer_blocks.4", "transformer_blocks.5", "transformer_blocks.6"]),
        (1, ["transformer_blocks.6"]),
        ((1, 3), ["conv_blocks.1", "conv_blocks.3"]),
        ((4, 7, -1), ["conv_blocks.4", "transformer_blocks.2", "transformer_blocks.6"]),
    ],
)
def test_features_only(indices: int | tuple[int, ...] | None, blocks: list[str], tmp_path: Path) -> None:
    ours = saved(tmp_path, position="rope")
    options = {} if indices is None else {"out_indices": indices}
    backbone = timm.create_model("sdpnet_l", features_only=True, position="rope", **options, **SMALL).eval()
    backbone.model.load_state_dict(ours.state_dict(), strict=False)
    assert backbone.feature_info.module_name() == blocks
    assert backbone.feature_info.channels() == [32] * len(blocks) and set(backbone.feature_info.reduction()) == {8}
    with torch.no_grad():
        for feature, expected in zip(backbone(IMAGES), by_hooks(ours, blocks), strict=True):
            assert torch.equal(feature, expected)
    kept = {name for name, _ in backbone.model.named_modules()}
    assert blocks[-1] in kept and "head.2.weight" not in backbone.model.state_dict()
    assert ("transformer_blocks.6" in kept) == (blocks[-1] == "transformer_blocks.6")  # what is not needed is gone


def test_intermediates_with_the_final_tokens(tmp_path: Path) -> None:
    saved(tmp_path, final_norm=True)
    path = str(tmp_path / "model.safetensors")
    model = timm.create_model("sdpnet_l", checkpoint_path=path, num_classes=7, final_norm=True, **SMALL).eval()
    with torch.no_grad():
        tokens = model.forward_features(IMAGES)
        last, features = model.forward_intermediates(IMAGES)
        assert torch.equal(last, tokens) and len(features) == 12
        ((patches, prefix),) = model.forward_intermediates(
            IMAGES, 1, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        assert torch.equal(torch.cat([prefix, patches], dim=1), tokens) and prefix.shape == (2, 5, 32)
        stopped, (feature,) = model.forward_intermediates(IMAGES, [2], stop_early=True)
        assert torch.equal(stopped, feature) and torch.equal(feature, features[2])


def test_the_demos_model(tmp_path: Path) -> None:
    """A card's whole `model` goes along as keywords."""
    ours = create_model("sdpnet_tiny", num_classes=10, conv_blocks=3, transformer_blocks=1, dim=96, kernel_size=5)
    card = ModelCard(ours.options, tuple("0123456789"), 64, 0.875, (0.5,) * 3, (0.2,) * 3, {})
    save_model(tmp_path, ours, card)
    options = json.loads((tmp_path / "model.json").read_text())["model"]
    path = str(tmp_path / "model.safetensors")
    model = timm.create_model("sdpnet_tiny", checkpoint_path=path, **options).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), ours.eval()(IMAGES))
    assert resolve_data_config({}, model=model)["input_size"] == (3, 64, 64)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="in_chans = 1: SdP-Net takes images of 3 channels"):
        timm.create_model("sdpnet_l", in_chans=1, **SMALL)
    with pytest.raises(UserError, match="global_pool = 'avg'"):
        timm.create_model("sdpnet_l", **SMALL).reset_classifier(5, "avg")
    with pytest.raises(UserError, match="did you mean 'registers'"):
        timm.create_model("sdpnet_l", register=5)
    for indices, allowed in (((0, 12), "numbers of its 12 blocks"), ((), "numbers of its 12"), (13, "1 to 12")):
        with pytest.raises(UserError, match=rf"out_indices = .*: must be {allowed}"):
            timm.create_model("sdpnet_l", features_only=True, out_indices=indices, **SMALL)
    with pytest.raises(UserError, match="block 4 is a conv block, which has no class token; choose from 5 on"):
        timm.create_model("sdpnet_l", **SMALL).forward_intermediates(IMAGES, [4, 5], return_prefix_tokens=True)
    with pytest.raises(UserError, match="output_fmt = 'NHWC': must be 'NCHW' or 'NLC'"):
        timm.create_model("sdpnet_l", **SMALL).forward_intermediates(IMAGES, output_fmt="NHWC")


def hub(name: str, **options: object) -> SdPNet:
    return torch.hub.load(str(ROOT), name, source="local", **options)


def test_torch_hub(tmp_path: Path) -> None:
    found = runpy.run_path(str(ROOT / "hubconf.py"))
    assert {n for n in found if callable(found[n]) and n[0] != "_"} == {"sdpnet_l", "sdpnet_xl", "sdpnet_xxl"}
    with torch.device("meta"):
        for name in ("sdpnet_l", "sdpnet_xl", "sdpnet_xxl"):
            assert hub(name, num_classes=5).options == create_model_options(name, num_classes=5)
    ours = saved(tmp_path, position="learned", grid_size=4)
    model = hub("sdpnet_l", checkpoint=str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), ours(IMAGES))
    assert hub("sdpnet_l", checkpoint=str(tmp_path), num_classes=3, grid_size=6)(IMAGES).shape == (2, 3)
    with pytest.raises(UserError, match="is no sdpnet_xl: its transformer_blocks is 7"):
        hub("sdpnet_xl", checkpoint=str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'dropout'"):
        hub("sdpnet_l", dropouts=0.1)
