"""The patch embedding as a copy and one product is the convolution; the choice follows the times."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants import choice
from sdpnet.execution.variants.choice import Measured
from sdpnet.execution.variants.patch import choose_patch, patch_variants
from sdpnet.model.patch_product import patch_product
from sdpnet.model.sdpnet import SdPNet, create_model_options
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.options import ShardOptions

CPU = torch.device("cpu")
ALONE = Processes(ShardOptions(), CPU)
ON_GPU = Processes(ShardOptions(), torch.device("cuda", 0))
FORMATS = [torch.channels_last, torch.contiguous_format]


def results(
    patch: nn.Conv2d, images: torch.Tensor, product: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, and the gradients of images, weight and bias."""
    patch.zero_grad()
    images = images.detach().requires_grad_()
    out = patch_product(images, patch.weight, patch.bias) if product else patch(images)
    out.backward(torch.arange(out.numel(), dtype=out.dtype).sin().view(out.shape))
    assert images.grad is not None and patch.weight.grad is not None and patch.bias.grad is not None
    return out.detach(), images.grad, patch.weight.grad, patch.bias.grad


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("image_format", FORMATS, ids=str)
@pytest.mark.parametrize("size", [(8, 12), (4, 4), (11, 13), (6, 7)])  # the last two are no multiples of 4
def test_equals_the_convolution(
    size: tuple[int, int], image_format: torch.memory_format, weight_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    patch = nn.Conv2d(3, 5, 4, stride=4, dtype=torch.float64).to(memory_format=weight_format)
    images = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=image_format)
    expected = results(patch, images, product=False)
    found = results(patch, images, product=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[0].permute(0, 2, 3, 1).is_contiguous()


def test_a_channels_last_weight_is_not_copied() -> None:
    """Its gradient has its strides, as DDP's buckets expect."""
    patch = nn.Conv2d(3, 5, 4, stride=4).to(memory_format=torch.channels_last)
    results(patch, torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), product=True)
    assert patch.weight.grad is not None and patch.weight.grad.stride() == patch.weight.stride()
    assert patch.weight.permute(0, 2, 3, 1).reshape(5, -1).data_ptr() == patch.weight.data_ptr()


def test_autocast() -> None:
    patch = nn.Conv2d(3, 8, 4, stride=4)
    images = torch.randn(2, 3, 8, 8).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = patch_product(images, patch.weight, patch.bias), patch(images)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_a_model_with_the_product() -> None:
    model = SdPNet(create_model_options("sdpnet_tiny", 3))
    names, images = list(model.state_dict()), torch.randn(2, 3, 32, 24)
    expected = model(images)
    model.patch_as_product = True
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names


def chosen(options: TrainOptions, processes: Processes) -> bool:
    model = SdPNet(create_model_options("sdpnet_tiny", 3))
    choose_patch(options, model, 8, 32, torch.bfloat16, processes)
    return model.patch_as_product


@pytest.mark.parametrize(("convolution", "product"), [(2.0, 1.0), (1.0, 2.0)])
def test_the_faster_one_is_chosen(convolution: float, product: float, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"convolution": Measured([convolution]), "product": Measured([product])}
    monkeypatch.setattr(choice, "_known", lambda variants, device: times)
    assert chosen(TrainOptions(), ON_GPU) is (product < convolution)


def test_on_a_cpu() -> None:
    assert not chosen(TrainOptions(), ALONE)
    assert chosen(TrainOptions(patch="product"), ALONE)
    assert not chosen(TrainOptions(patch="convolution"), ALONE)
    with pytest.raises(
        UserError, match=r"^train.patch = 'product': needs train.memory_format = channels_last or probe$"
    ):
        chosen(TrainOptions(patch="product", memory_format="contiguous"), ALONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_variants_agree(dtype: torch.dtype) -> None:
    model = create_model_options("sdpnet_tiny", 3)
    measured = choice.race(patch_variants(TrainOptions(), model, 4, 32, dtype, CPU), CPU, rounds=1)
    assert not any(row.reason for row in measured.values()), measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_pytorch_on_a_gpu(dtype: torch.dtype) -> None:
    model = create_model_options("sdpnet_xl")
    measured = choice.race(patch_variants(TrainOptions(), model, 256, 224, dtype, ON_GPU.device), ON_GPU.device)
    assert not any(row.reason for row in measured.values()), measured


def test_a_convolutional_stem_has_no_patch_convolution() -> None:
    model = SdPNet(create_model_options("sdpnet_tiny", num_classes=3, stem="conv"))
    assert choose_patch(TrainOptions(), model, 2, 32, torch.float32, ALONE) == []
    with pytest.raises(UserError, match=r"^train\.patch = 'product': model\.stem = 'conv' has no patch convolution$"):
        choose_patch(TrainOptions(patch="product"), model, 2, 32, torch.float32, ALONE)
