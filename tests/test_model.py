from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipelines.errors import UserError
from sdpnet.model import MODELS, SdPNet, create_model

PUBLISHED = {"sdpnet_l": 55_138_320, "sdpnet_xl": 76_401_936, "sdpnet_xxl": 85_882_896}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        assert create_model(name, registers=0).num_parameters == PUBLISHED[name]
        assert create_model(name).num_parameters == PUBLISHED[name] + 3072


def tiny(**overrides: object) -> SdPNet:
    torch.manual_seed(0)
    return create_model("sdpnet_tiny", num_classes=7, **overrides)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (8, 8), (60, 71)])
def test_works_at_any_image_size(train: bool, size: tuple[int, int]) -> None:
    model = tiny().train(train)
    assert model(torch.randn(3, 3, *size)).shape == (3, 7)


def straightforward(model: SdPNet, images: torch.Tensor) -> torch.Tensor:
    """The published model in eval mode, written down with PyTorch's own encoder layer, in float64."""

    def norm(layer: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        assert layer.running_mean is not None and layer.running_var is not None
        mean, var = layer.running_mean.view(1, -1, 1, 1), layer.running_var.view(1, -1, 1, 1)
        return (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)

    options = model.options
    x = norm(model.patch_norm, F.conv2d(images, model.patch.weight, model.patch.bias, stride=options.patch_size))
    for block in model.conv_blocks:
        weight = block.depthwise.weight
        y = norm(block.norm1, F.gelu(F.conv2d(x, weight, block.depthwise.bias, padding=3, groups=options.dim)))
        x = norm(block.norm2, F.gelu(F.conv2d(x + y, block.pointwise.weight, block.pointwise.bias)))
    tokens = [model.class_token[0, 0].expand(len(x), -1)]
    tokens += [model.registers[0, r].expand(len(x), -1) for r in range(options.registers)]
    tokens += [x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])]
    z = torch.stack(tokens, dim=1)
    for block in model.transformer_blocks:
        layer = nn.TransformerEncoderLayer(
            options.dim,
            options.heads,
            options.dim * options.mlp_ratio,
            dropout=0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            dtype=torch.float64,
        ).eval()
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": block.qkv.weight,
                "self_attn.in_proj_bias": block.qkv.bias,
                "self_attn.out_proj.weight": block.proj.weight,
                "self_attn.out_proj.bias": block.proj.bias,
                "linear1.weight": block.mlp[0].weight,
                "linear1.bias": block.mlp[0].bias,
                "linear2.weight": block.mlp[3].weight,
                "linear2.bias": block.mlp[3].bias,
                "norm1.weight": block.norm1.weight,
                "norm1.bias": block.norm1.bias,
                "norm2.weight": block.norm2.weight,
                "norm2.bias": block.norm2.bias,
            }
        )
        z = layer(z)
    hidden = torch.tanh(F.linear(z[:, 0], model.head[0].weight, model.head[0].bias))
    return F.linear(hidden, model.head[2].weight, model.head[2].bias)


def test_equals_the_model_written_down_with_torchs_own_layers() -> None:
    model = tiny(registers=3, dropout=0.3).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    model(images)  # moves the batch-norm statistics away from their start
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(images), straightforward(model, images), atol=1e-12)


def test_channels_last_and_autocast_agree_with_plain_float32() -> None:
    model, images = tiny().eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(plain, last, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(plain, model(images).float(), atol=0.05)


def test_trains_in_channels_last_under_autocast() -> None:
    model = tiny().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (
            model(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)).float().logsumexp(1).mean()
        )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_without_a_graph_break_and_agrees() -> None:
    model = tiny().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in (32, 64):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.allclose(model(images), compiled(images), atol=1e-5)


def test_dropout_is_in_the_feed_forward_part_only() -> None:
    model = tiny(dropout=0.5)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert names and all(".mlp." in name for name in names)
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))


def test_mistakes_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'sdpnet_xl'"):
        create_model("sdpnet-xl")
    with pytest.raises(UserError, match="did you mean 'registers'"):
        create_model("sdpnet_l", register=3)
    with pytest.raises(UserError, match=r"model\.heads = 5: must divide"):
        create_model("sdpnet_tiny", heads=5)
    assert set(PUBLISHED) <= set(MODELS)
