"""The models as timm and torch.hub give them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import sdpnet.timm_models  # noqa: F401 (it registers them)
from pipelines.errors import UserError
from sdpnet.checkpoint import ModelCard, save_model
from sdpnet.model import SdPNet, create_model, create_model_options

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"dim": 32, "heads": 4, "head_hidden": 24, "patch_size": 8}  # sdpnet_l's depth, and quick
IMAGES = torch.randn(2, 3, 32, 32)


def saved(directory: Path, **overrides: object) -> SdPNet:
    torch.manual_seed(0)
    model = create_model("sdpnet_l", **{"num_classes": 7, **SMALL, **overrides})
    model(IMAGES)
    names = tuple(f"class{number}" for number in range(model.options.num_classes))
    save_model(directory, model, ModelCard(model.options, names, 32, 0.875, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {}))
    return model.eval()


@pytest.mark.parametrize("name", ["sdpnet_l", "sdpnet_xl", "sdpnet_xxl"])
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


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="in_chans = 1: SdP-Net takes images of 3 channels"):
        timm.create_model("sdpnet_l", in_chans=1, **SMALL)
    with pytest.raises(UserError, match="global_pool = 'avg'"):
        timm.create_model("sdpnet_l", **SMALL).reset_classifier(5, "avg")
    with pytest.raises(UserError, match="did you mean 'registers'"):
        timm.create_model("sdpnet_l", register=5)


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
