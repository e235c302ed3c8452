"""The ways to compute the patch embedding: PyTorch's convolution, or a copy and one matrix product."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.variants.choice import Pass, Variants, choose, images_of_pass
from sdpnet.model.patch_product import patch_product
from sdpnet.model.sdpnet import ModelOptions, SdPNet
from sdpnet.pipelines.errors import UserError

__all__ = ["choose_patch", "patch_variants"]


def patch_variants(
    options: TrainOptions,
    model: ModelOptions,
    batch_size: int,
    image_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Variants:
    """The variants for the model's shape. A pass needs no gradient of the images, as in training."""
    shape = (images_of_pass(options, batch_size), 3, image_size, image_size)
    channels_last = options.memory_format != "contiguous"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def make(product: bool) -> Callable[[], Pass]:
        def prepare() -> Pass:
            if product and not channels_last:
                raise UserError("needs train.memory_format = channels_last or probe")
            torch.manual_seed(0)
            patch = torch.nn.Conv2d(3, model.dim, model.patch_size, stride=model.patch_size, device=device)
            patch.to(memory_format=memory_format)
            images = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format)
            result = (len(images), model.dim, *[image_size // model.patch_size] * 2)
            upstream = torch.randn(result, device=device, dtype=dtype).contiguous(memory_format=memory_format)

            def one_pass() -> list[torch.Tensor]:
                patch.zero_grad(set_to_none=True)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    out = patch_product(images, patch.weight, patch.bias) if product else patch(images)
                out.backward(upstream)
                # The gradients come from products in `dtype`, so they agree to its precision only.
                return [out, *(p.grad.to(dtype) for p in patch.parameters() if p.grad is not None)]

            return one_pass

        return prepare

    what = f"{dtype}, {shape}, patches of {model.patch_size}, {model.dim} channels, {memory_format}"
    return Variants("train.patch", what, {"convolution": make(False), "product": make(True)})


def choose_patch(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Sets `patch_as_product` of the model as `train.patch` says. Every process must call it.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: the product is asked for with `train.memory_format = contiguous`, where its result would have to be
            copied, or for a convolutional stem.
    """
    if model.options.stem != "patch":
        if options.patch == "product":
            raise UserError(f"train.patch = 'product': model.stem = {model.options.stem!r} has no patch convolution")
        return []
    variants = patch_variants(options, model.options, batch_size, image_size, dtype, processes.device)
    name, notes = choose(variants, options.patch, processes)
    model.patch_as_product = name == "product"
    return notes
