from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from sdpnet.checkpoints.model import ModelCard, save_model
from sdpnet.model.sdpnet import SdPNet, create_model
from sdpnet.pipelines.errors import UserError
from sdpnet.training.finetune import start_from

TRAINED = {"position": "learned", "grid_size": 4, "layer_scale": 0.1, "final_norm": True, "dropout": 0.2}


def tiny(seed: int, **overrides: object) -> SdPNet:
    torch.manual_seed(seed)
    return create_model("sdpnet_tiny", **{"num_classes": 7, **TRAINED, **overrides})


def trained(directory: Path, **overrides: object) -> SdPNet:
    """A run's model, away from its start in everything, saved in `directory`."""
    model = tiny(1, **overrides)
    model(torch.randn(4, 3, 32, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    names = tuple(f"class{number}" for number in range(model.options.num_classes))
    save_model(directory, model, ModelCard(model.options, names, 32, 0.875, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {}))
    return model


def test_the_same_model_takes_all(tmp_path: Path) -> None:
    theirs, ours = trained(tmp_path), tiny(2, dropout=0.0, drop_path=0.3, layer_scale=1e-4)
    assert start_from(ours, tmp_path) == f"weights taken from {tmp_path}"
    assert all(torch.equal(a, theirs.state_dict()[name]) for name, a in ours.state_dict().items())
    assert start_from(tiny(2), tmp_path / "model.safetensors").endswith("model.safetensors")


def test_another_resolution_resamples_the_position_embedding(tmp_path: Path) -> None:
    theirs, ours = trained(tmp_path), tiny(2, grid_size=6)
    line = start_from(ours, tmp_path)
    assert line.endswith(", except: position embedding resampled from 4 x 4 to 6 x 6 patches")
    expected = resample_abs_pos_embed(theirs.position_embedding, [6, 6], num_prefix_tokens=0, antialias=False)
    assert torch.equal(ours.position_embedding, expected)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(images), theirs.eval()(images), atol=1e-5)


def test_other_classes_start_the_last_layer_anew(tmp_path: Path) -> None:
    theirs, ours, untouched = trained(tmp_path), tiny(2, num_classes=3), tiny(2, num_classes=3)
    assert start_from(ours, tmp_path).endswith(", except: the head's last layer starts anew (7 -> 3 classes)")
    assert torch.equal(ours.head[2].weight, untouched.head[2].weight)
    assert torch.equal(ours.head[2].bias, untouched.head[2].bias)
    taken = {name: value for name, value in ours.state_dict().items() if not name.startswith("head.2.")}
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in taken.items())
    assert ours(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_as_many_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    """A key decides what becomes of the head; other names are no difference where nobody knows the new ones."""
    theirs, same = trained(tmp_path), [f"class{number}" for number in range(7)]
    assert start_from(tiny(2), tmp_path, same) == f"weights taken from {tmp_path}"
    for names, difference in (
        ([*same[:3], "cat", *same[4:]], "class 3 is 'class3' there and 'cat' here"),
        (same[::-1], "class 0 is 'class0' there and 'class6' here (the same names in another order)"),
        (same[:5], "class 5, 'class5', is only there (7 classes there, 5 here)"),
    ):
        with pytest.raises(UserError) as error:
            start_from(tiny(2), tmp_path, names)
        assert f"was trained on other classes: {difference}; set train.other_classes=new_head" in str(error.value)
        kept, anew = tiny(2), tiny(2)
        assert start_from(kept, tmp_path, names, "keep").endswith(f"although its classes are others: {difference}")
        assert torch.equal(kept.head[2].weight, theirs.head[2].weight)
        assert start_from(anew, tmp_path, names, "new_head").endswith(
            f"the head's last layer starts anew ({difference})"
        )
        assert torch.equal(anew.head[2].weight, tiny(2).head[2].weight)
        assert torch.equal(anew.head[0].weight, theirs.head[0].weight)
    assert start_from(tiny(2, num_classes=3), tmp_path, same[:3]).endswith("starts anew (7 -> 3 classes)")


def test_both_at_once_are_one_line(tmp_path: Path) -> None:
    trained(tmp_path)
    line = start_from(tiny(2, num_classes=3, grid_size=2), tmp_path)
    assert "resampled from 4 x 4 to 2 x 2 patches; the head's last layer" in line and "\n" not in line


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 8},  # this and the position show in no weight
        {"position": "none"},
        {"position": "rope"},
        {"dim": 64},
        {"conv_blocks": 3},
        {"transformer_blocks": 1},
        {"mlp_ratio": 4},
        {"patch_size": 4},
        {"kernel_size": 5},
        {"head_hidden": 64},
        {"registers": 2},
        {"layer_scale": 0.0},
        {"final_norm": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_other_difference_is_named_and_changes_nothing(change: dict[str, object], tmp_path: Path) -> None:
    trained(tmp_path)
    ours = tiny(2, **change)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=rf"was trained with model\.{name} .*, not {value!r}: its weights do not fit"):
        start_from(ours, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_sincos_is_not_taken_for_none(tmp_path: Path) -> None:
    trained(tmp_path, position="sincos")
    with pytest.raises(UserError, match=r"trained with model\.position 'sincos', not 'none'"):
        start_from(tiny(2, position="none"), tmp_path)
