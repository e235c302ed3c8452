from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from timm.layers import LayerScale, calculate_drop_path_rates
from timm.layers import drop_path as timm_drop_path
from torch import nn
from torch.nn import functional as F

from sdpnet.model.sdpnet import MODELS, DropPath, SdPNet, create_model
from sdpnet.pipelines.errors import UserError

PUBLISHED = {"sdpnet_l": 55_138_320, "sdpnet_xl": 76_401_936, "sdpnet_xxl": 85_882_896}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        assert create_model(name, registers=0).num_parameters == PUBLISHED[name]
        assert create_model(name).num_parameters == PUBLISHED[name] + 3072


def tiny(**overrides: object) -> SdPNet:
    torch.manual_seed(0)
    return create_model("sdpnet_tiny", num_classes=7, **overrides)


POSITIONS = ("none", "learned", "sincos", "rope")
EVERYTHING = {"layer_scale": 0.1, "drop_path": 0.4, "final_norm": True, "dropout": 0.1}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (8, 8), (60, 71)])
def test_works_at_any_image_size(position: str, train: bool, size: tuple[int, int]) -> None:
    model = tiny(position=position, **EVERYTHING).train(train)
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
    model = tiny(registers=3, dropout=0.3, drop_path=0.3).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    model(images)  # moves the batch-norm statistics away from their start
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(images), straightforward(model, images), atol=1e-12)


@pytest.mark.parametrize("position", POSITIONS)
def test_channels_last_and_autocast_agree_with_plain_float32(position: str) -> None:
    model, images = tiny(position=position, **EVERYTHING).eval(), torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(plain, last, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(plain, model(images).float(), atol=0.05)


@pytest.mark.parametrize("position", POSITIONS)
def test_trains_in_channels_last_under_autocast(position: str) -> None:
    model = tiny(position=position, **EVERYTHING).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (
            model(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)).float().logsumexp(1).mean()
        )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("position", POSITIONS)
def test_compiles_without_a_graph_break_and_agrees(position: str) -> None:
    model = tiny(position=position, **EVERYTHING).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((32, 32), (64, 48)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert torch.allclose(model(images), compiled(images), atol=1e-5)


def test_parameters_of_the_switches() -> None:
    """By hand: two factors a block and channel, a norm's weight and bias, an embedding for each of 14 x 14 patches."""
    with torch.device("meta"):
        plain = create_model("sdpnet_xl").num_parameters
        for position, number in (("none", 0), ("sincos", 0), ("rope", 0), ("learned", 196 * 768)):
            model = create_model("sdpnet_xl", position=position)
            assert model.num_parameters == plain + number
            assert len(model.state_dict()) == len(create_model("sdpnet_xl").state_dict()) + (position == "learned")
        assert create_model("sdpnet_xl", layer_scale=1e-4).num_parameters == plain + 10 * 2 * 768
        assert create_model("sdpnet_xl", final_norm=True).num_parameters == plain + 2 * 768
        assert create_model("sdpnet_xl", drop_path=0.2).num_parameters == plain


def written_down(model: SdPNet, images: torch.Tensor) -> torch.Tensor:
    """The model with its switches, in eval mode, by loops and complex numbers; float64."""
    options = model.options
    x = model.conv_blocks(model.patch_norm(model.patch(images)))
    rows, columns, heads, width = x.shape[2], x.shape[3], options.heads, options.dim // options.heads
    places = list(product(range(rows), range(columns)))
    patches = torch.stack([x[:, :, i, j] for i, j in places], dim=1)
    if options.position == "sincos":
        for number, place in enumerate(places):
            for channel in range(options.dim):
                quarter, band = divmod(channel, options.dim // 4)
                angle = place[quarter % 2] * 10_000 ** (-band / (options.dim // 4))
                patches[:, number, channel] += (math.sin, math.cos)[quarter // 2](angle)
    lead = [token.expand(len(x), -1, -1) for token in (model.class_token, model.registers)]
    z = torch.cat([*lead, patches], dim=1)
    turns = torch.ones(z.shape[1], width // 2, dtype=torch.complex128)
    for number, place in enumerate(places):
        for pair in range(width // 2):
            axis, band = divmod(pair, width // 4)
            angle = place[axis] * 100 ** (-band / (width // 4))
            turns[1 + options.registers + number, pair] = complex(math.cos(angle), math.sin(angle))
    for block in model.transformer_blocks:
        q, k, v = block.qkv(block.norm1(z)).chunk(3, dim=-1)
        outputs = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            a, b = (torch.complex(t[..., part][..., : width // 2], t[..., part][..., width // 2 :]) for t in (q, k))
            if options.position == "rope":
                a, b = a * turns, b * turns
            scores = (a @ b.conj().transpose(1, 2)).real / math.sqrt(width)
            outputs.append(scores.softmax(-1) @ v[..., part])
        z = z + block.proj(torch.cat(outputs, dim=-1)) * block.scale1.gamma
        z = z + block.mlp(block.norm2(z)) * block.scale2.gamma
    return model.head(model.norm(z)[:, 0])


@pytest.mark.parametrize("position", ["none", "sincos", "rope"])
def test_equals_the_model_written_down_with_complex_numbers(position: str) -> None:
    model = tiny(position=position, **EVERYTHING).double().eval()
    for block in model.transformer_blocks:
        nn.init.normal_(block.scale1.gamma)
        nn.init.normal_(block.scale2.gamma)
        nn.init.normal_(block.qkv.weight, std=0.3)  # far from uniform attention
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model(images), written_down(model, images), atol=1e-12)


@pytest.mark.parametrize("position", ["learned", "sincos", "rope"])
def test_a_position_tells_patches_apart(position: str) -> None:
    """Without conv blocks and position, the order of the patches does not matter to the class token."""
    images = torch.randn(2, 3, 32, 32)
    swapped = images.unflatten(3, (4, 8)).flip(3).flatten(3)
    for name, same in ((position, False), ("none", True)):
        model = tiny(position=name, conv_blocks=0).eval()
        with torch.no_grad():
            for block in model.transformer_blocks:
                block.qkv.weight.mul_(20)
            assert torch.allclose(model(images), model(swapped), atol=1e-5) == same


def test_layer_scale_is_timms() -> None:
    ours = tiny(layer_scale=1e-4).transformer_blocks[0].scale2
    theirs, x = LayerScale(128, 1e-4), torch.randn(2, 5, 128)
    assert torch.equal(ours(x), theirs(x))


def test_a_small_layer_scale_is_not_rounded_away_under_autocast() -> None:
    model, images = tiny(layer_scale=1e-4, final_norm=True).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = model.tokens(images)
        for block in model.transformer_blocks:
            block.scale1.gamma.zero_()
            block.scale2.gamma.zero_()
        assert tokens.dtype == torch.float32 and (tokens != model.tokens(images)).float().mean() > 0.9


def test_drop_path_rises_with_depth_as_in_timm() -> None:
    model = tiny(conv_blocks=3, transformer_blocks=4, drop_path=0.3)
    rates = [block.drop_path.rate for block in (*model.conv_blocks, *model.transformer_blocks)]
    assert rates == pytest.approx(calculate_drop_path_rates(0.3, 7))
    assert tiny(conv_blocks=0, transformer_blocks=1, drop_path=0.3).transformer_blocks[0].drop_path.rate == 0


@pytest.mark.parametrize("shape", [(4000, 3, 2), (4000, 2, 3, 3)])
def test_drop_path_drops_whole_samples(shape: tuple[int, ...]) -> None:
    """A share of 0.7 +- 5 sigma is kept, as timm scales it. The draws are not timm's."""
    x = torch.randn(shape)
    torch.manual_seed(1)
    ours, theirs = DropPath(0.3)(x), timm_drop_path(x, 0.3, training=True)
    both = ((ours != 0) & (theirs != 0)).flatten(1)[:, 0]
    assert both.any() and torch.allclose(ours[both], theirs[both])
    kept = (ours != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1)) and torch.allclose(ours[kept[:, 0]], x[kept[:, 0]] / 0.7)
    assert abs(kept[:, 0].float().mean() - 0.7) < 5 * math.sqrt(0.21 / 4000)
    assert DropPath(0.3).eval()(x) is x


def test_a_dropped_branch_leaves_the_way_around_it() -> None:
    model = tiny(drop_path=0.5)
    block = model.transformer_blocks[1]
    assert block.drop_path.rate == 0.5
    x = torch.randn(400, 3, 128)
    with torch.no_grad():
        unchanged = (block(x) == x).flatten(1).all(1).float().mean()
    assert abs(unchanged - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_checkpointing_changes_neither_gradients_nor_statistics(position: str, autocast: bool) -> None:
    images, after = torch.randn(4, 3, 32, 32), []
    for checkpointing in (False, True):
        model = tiny(position=position, **EVERYTHING)
        model.checkpointing = checkpointing
        for step in range(2):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(images)
            logits.float().logsumexp(1).mean().backward()
            drawn = torch.rand(1)
        after.append({"logits": logits, "drawn": drawn, **model.state_dict()})
        after[-1] |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
        assert all(norm.momentum == 0.1 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    assert after[0].keys() == after[1].keys()
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    kept = []
    for checkpointing in (False, True):
        model, sizes = tiny(position="rope"), []
        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            model(torch.randn(2, 3, 64, 64))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_checkpointing_compiles_and_agrees(position: str) -> None:
    images, models = torch.randn(4, 3, 32, 32), [tiny(position=position, layer_scale=0.1) for _ in range(2)]
    models[1].checkpointing = True
    for model, run in ((models[0], models[0]), (models[1], torch.compile(models[1], backend="aot_eager"))):
        for _ in range(2):
            run(images).logsumexp(1).mean().backward()
        assert model.conv_blocks[0].norm1.num_batches_tracked == 2
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name
    for (name, a), b in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_an_evaluation_before_training_does_no_harm() -> None:
    """What is computed for a grid in inference mode must do for training too."""
    for position in ("sincos", "rope"):
        model, images = tiny(position=position), torch.randn(2, 3, 40, 56)
        with torch.inference_mode():
            model(images)
        model(images).sum().backward()


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
    with pytest.raises(UserError, match=r"model\.position = 'sincoss': did you mean 'sincos'"):
        create_model("sdpnet_tiny", position="sincoss")
    with pytest.raises(UserError, match=r"needs model\.dim / model\.heads = 2 to be a multiple of 4"):
        create_model("sdpnet_tiny", position="rope", heads=64)
    with pytest.raises(UserError, match=r"model\.drop_path = 1\.0: must be in"):
        create_model("sdpnet_tiny", drop_path=1.0)
    with pytest.raises(UserError, match=r"model\.layer_scale = -1: must be 0 \(off\) or more"):
        create_model("sdpnet_tiny", layer_scale=-1)
    with pytest.raises(UserError, match=r"model\.grid_size = 0: must be at least 1"):
        create_model("sdpnet_tiny", grid_size=0)
    assert set(PUBLISHED) <= set(MODELS)
