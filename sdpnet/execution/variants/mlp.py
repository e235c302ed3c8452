"""The ways to compute the feed-forward part of a transformer block: PyTorch's, and ours in Triton and in cuBLASLt."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from sdpnet.config.options import TrainOptions
from sdpnet.distributed.processes import Processes
from sdpnet.execution.compiled import compile_blocks
from sdpnet.execution.variants.choice import Pass, Variants, choose
from sdpnet.model.dropout import draw_keys
from sdpnet.model.feed_forward import FeedForward, Variant
from sdpnet.model.kernels import cublaslt, feed_forward
from sdpnet.model.sdpnet import ModelOptions, SdPNet, TransformerBlock
from sdpnet.pipelines.errors import UserError

__all__ = ["choose_mlp", "mlp_variants"]

_MOST_IMAGES = 256  # with more images, the time is proportional to their number


def choose_mlp(
    options: TrainOptions, model: SdPNet, batch_size: int, image_size: int, dtype: torch.dtype, processes: Processes
) -> list[str]:
    """Sets `mlp.variant` of the transformer blocks as `train.mlp` says. Every process must call it.

    Returns:
        Lines for the user about the choice.

    Raises:
        UserError: the variant that is asked for cannot run here.
    """
    images = min([batch_size, _MOST_IMAGES, *([options.micro_batch] if isinstance(options.micro_batch, int) else [])])
    compiled = options.compile is True
    variants = mlp_variants(model.options, images, image_size, dtype, processes.device, compiled=compiled)
    name, notes = choose(variants, options.mlp, processes)
    if compiled and notes:
        # What torch.compile has recorded about these feed-forward parts must not affect the training model.
        torch._dynamo.reset()
    for block in model.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        block.mlp.variant = name  # type: ignore[assignment]
    return notes


def mlp_variants(
    options: ModelOptions, images: int, image_size: int, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Variants:
    """The variants for the tokens of `images` images, with the model's dropout, forward and backward.

    Args:
        options: the shape of the model.
        images: the number of images in a pass.
        image_size: pixels a side.
        dtype: the dtype of the products. Parameters are float32, with autocast where it is another one.
        device: where they run.
        compiled: whether the part is compiled.
    """
    tokens = 1 + options.registers + (image_size // options.patch_size) ** 2
    shape, hidden = (images, tokens, options.dim), options.dim * options.mlp_ratio
    shared: list[tuple[FeedForward, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def prepare(variant: Variant) -> Pass:
        _require_possible(variant, options, dtype, device)
        if not shared:
            module = FeedForward(options.dim, hidden, options.dropout).to(device).train()
            x, gradient = torch.randn(2, *shape, device=device, dtype=dtype)
            shared.append((module, x, gradient, draw_keys(1, images * tokens, hidden, device)[0]))
        original, x, gradient, keys = shared[0]
        module = copy.deepcopy(original)
        module.variant = variant
        if compiled:
            compile_blocks([module])
        inputs = x.clone().requires_grad_()

        def one_pass() -> Sequence[torch.Tensor]:
            module.zero_grad(set_to_none=True)
            inputs.grad = None
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = module(inputs, keys if options.dropout else None)
            out.backward(gradient)
            # In the dtype of the products, because that says how far results may differ by rounding.
            gradients = [tensor.grad for tensor in (inputs, *module.parameters())]
            return [out.detach(), *(found.to(dtype) for found in gradients if found is not None)]

        return one_pass

    what = f"{dtype}, {shape}, hidden {hidden}, dropout {options.dropout:g}{', compiled' if compiled else ''}"
    return Variants(
        "train.mlp",
        what,
        {
            "torch": lambda: prepare("torch"),
            "triton": lambda: prepare("triton"),
            "cublaslt": lambda: prepare("cublaslt"),
        },
    )


def _require_possible(variant: Variant, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> None:
    """Raises `UserError` if a variant cannot compute the feed-forward part of such a model."""
    if variant == "triton" and not feed_forward.runs_on(device):
        raise UserError("needs Triton and an NVIDIA GPU of compute capability 8.0 or more; use auto or torch")
    if variant == "cublaslt":
        if options.dropout:
            raise UserError("has no dropout; set model.dropout to 0, or use auto, torch or triton")
        if dtype not in (torch.bfloat16, torch.float16):
            raise UserError("needs half precision: train.amp bf16 or fp16; or use auto, torch or triton")
        if options.dim % 8 or not cublaslt.runs_on(device):
            raise UserError(
                "needs cuBLASLt, an NVIDIA GPU of compute capability 8.0 or more and model.dim in multiples of 8; "
                "use auto or torch"
            )
