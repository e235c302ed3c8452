"""The optimizer: which parameters it updates, how, and how it skips a bad step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdpnet.config.options import OptimOptions
from sdpnet.model.sdpnet import SdPNet
from sdpnet.optim.muon import Muon, MuonAdamW
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.terminal.remedy import install_extra

__all__ = ["make_optimizer", "step_unless"]

_TOKENS = ("class_token", "registers", "position")


def make_optimizer(model: nn.Module, options: OptimOptions, *, fused: bool | None = None) -> torch.optim.Optimizer:
    """Makes the optimizer: AdamW (Loshchilov & Hutter, 2017) or, with `name: muon` or `nadamuon`, Muon and AdamW.

    Muon takes the matrices and 1 x 1 convolutions of the blocks, and AdamW the rest: patch convolution, depthwise
    filters and head.

    Weight decay applies to matrices and filters only, not to norms, biases, layer scales, the class token, the
    registers or the position embedding. Each group has an `lr_scale` for `set_learning_rate`: `layer_decay` to the
    power of the number of layers above it (BEiT, Bao et al., 2021). The top layer is the head with its norm. Below it,
    each transformer block and each conv block is a layer. The lowest layer consists of the patch convolution, the
    tokens and the position embedding. A model that is not an SdP-Net is a single layer without matrices for Muon.

    Args:
        fused: whether AdamW is fused. By default it is fused if the parameters are on a GPU.
    """
    blocks: list[str] = []
    if isinstance(model, SdPNet):
        blocks += [f"conv_blocks.{i}." for i in range(len(model.conv_blocks))]
        blocks += [f"transformer_blocks.{i}." for i in range(len(model.transformer_blocks))]

    def layers_above(name: str) -> int:
        if name.startswith(("patch", *_TOKENS)):
            return len(blocks) + 1
        return next((len(blocks) - i for i, block in enumerate(blocks) if name.startswith(block)), 0)

    # The key is: whether Muon takes the parameters, their lr_scale, and whether they have no weight decay.
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or "scale" in name or name.startswith(_TOKENS)
        is_matrix = not spared and parameter.shape[1] > 1 and parameter.shape[2:].numel() == 1
        for_muon = options.name != "adamw" and is_matrix and name.startswith(tuple(blocks))
        kind = (for_muon, options.layer_decay ** layers_above(name), spared)
        groups.setdefault(kind, []).append(parameter)

    def groups_for(muon: bool) -> list[dict[str, Any]]:
        return [
            {"params": groups[kind], "lr_scale": kind[1], "weight_decay": 0.0 if kind[2] else options.weight_decay}
            for kind in sorted(groups)
            if kind[0] == muon
        ]

    fused = fused or next(model.parameters()).is_cuda or None
    adamw = torch.optim.AdamW(groups_for(False), lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)
    if options.name == "adamw":
        return adamw
    if options.name == "nadamuon":
        return MuonAdamW(_nadamuon(groups_for(True), options), adamw)
    return MuonAdamW(Muon(groups_for(True), options.lr, options.weight_decay), adamw)


def _nadamuon(groups: list[dict[str, Any]], options: OptimOptions) -> torch.optim.Optimizer:
    """timm's AdaMuon (Si et al., 2025) with Nesterov momentum. Raises `UserError` where timm is missing or older."""
    try:
        from timm.optim import Muon as TimmMuon

        # As with Muon, updates have the root mean square of AdamW's, so that both share a learning rate.
        common = {"lr": options.lr, "weight_decay": options.weight_decay, "betas": options.betas}
        return TimmMuon(groups, **common, nesterov=True, algo="adamuon", adjust_lr_fn="match_rms_adamw")
    except (ImportError, TypeError):
        remedy = install_extra("timm")
        raise UserError(f"optim.name = 'nadamuon': needs a timm with AdaMuon (1.0.22 or newer): {remedy}") from None


def step_unless(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
    """Takes an optimizer step unless `bad` (a float32 scalar on the parameters' device) is 1.

    In a skipped step, weights, moments and step counts do not change, whatever the gradients are. Fused optimizers and
    Muon skip the step on the device, without making the host wait. Other optimizers, which are used on CPUs only, read
    the value on the host.
    """
    parts = list(optimizer.parts.values()) if isinstance(optimizer, MuonAdamW) else [optimizer]
    if not all(isinstance(part, Muon) or part.defaults.get("fused") for part in parts):
        if not bad.item():
            optimizer.step()
        return
    for part in parts:
        part.grad_scale, part.found_inf = None, bad  # type: ignore[attr-defined]  # as GradScaler sets them
        try:
            part.step()
        finally:
            del part.grad_scale, part.found_inf  # type: ignore[attr-defined]
