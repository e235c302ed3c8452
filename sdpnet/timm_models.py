"""SdP-Net in timm: importing this module registers sdpnet_l, sdpnet_xl and sdpnet_xxl.

    import timm
    import sdpnet.timm_models  # timm has no entry points: it finds the models only after this import

    model = timm.create_model("sdpnet_xl", checkpoint_path="RUN/model.safetensors")

Parameters have the same names as in `sdpnet.model`. timm reads the weights and not the `model.json` beside them: what
that says of `model` and is not the name's own goes along as keywords (num_classes=100, position="rope", ...).
Needs the extra `timm` (in a checkout: pip install -e '.[timm]').
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from pipelines.contract import AugmentOptions, DataOptions
from pipelines.errors import UserError
from sdpnet.model import SdPNet, create_model_options

__all__ = ["TimmSdPNet", "sdpnet_l", "sdpnet_xl", "sdpnet_xxl"]


class TimmSdPNet(SdPNet):
    """`SdPNet` with what timm asks of a model. `num_classes` 0 is without the last layer: (B, head_hidden).

    `drop_rate` and `drop_path_rate` are timm's names of `dropout` and `drop_path`.
    """

    def __init__(self, name: str, num_classes: int = 1000, in_chans: int = 3, **options: Any) -> None:
        if in_chans != 3:
            raise UserError(f"in_chans = {in_chans}: SdP-Net takes images of 3 channels")
        for theirs, ours in (("drop_rate", "dropout"), ("drop_path_rate", "drop_path")):
            if theirs in options:
                options[ours] = options.pop(theirs)
        super().__init__(create_model_options(name, num_classes or 1, **options))
        self.num_features = self.embed_dim = self.options.dim
        self.head_hidden_size = self.options.head_hidden
        self.num_classes = num_classes
        if num_classes == 0:
            self.reset_classifier(0)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), normalised -> tokens [class, registers, patches] (B, 1 + R + N, dim)."""
        return self.norm(self.tokens(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens -> logits (B, num_classes); with `pre_logits` the head's hidden layer (B, head_hidden)."""
        hidden, activation, last = self.head
        x = activation(hidden(x[:, 0]))
        return x if pre_logits else last(x)

    def get_classifier(self) -> nn.Module:
        return self.head[2]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another last layer, at its start; 0: none. Pooling is the class token's, and cannot be chosen."""
        if global_pool not in (None, "", "token"):
            raise UserError(f"global_pool = {global_pool!r}: SdP-Net's head takes the class token; must be 'token'")
        self.num_classes = num_classes
        self.head[2] = nn.Identity()
        if num_classes:
            weight = self.head[0].weight
            last = nn.Linear(self.options.head_hidden, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.trunc_normal_(last.weight, std=0.02)
            nn.init.zeros_(last.bias)
            self.head[2] = last
            self.options = replace(self.options, num_classes=num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"class_token", "registers", "position_embedding"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that give each parameter its depth, for layer-wise learning rates."""
        return {
            "stem": r"^patch|^class_token|^registers|^position_embedding",
            "conv_blocks": r"^conv_blocks\.(\d+)",
            "transformer_blocks": [(r"^transformer_blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }


def _create(name: str, pretrained: bool, **options: Any) -> TimmSdPNet:
    return build_model_with_cfg(TimmSdPNet, name, pretrained, name=name, **options)


_CFG = {
    "url": "",
    "input_size": (3, 224, 224),
    "crop_pct": DataOptions().centre_fraction,
    "interpolation": "bilinear",
    "mean": AugmentOptions().mean,
    "std": AugmentOptions().std,
    "num_classes": 1000,
    "pool_size": None,
    "first_conv": "patch",
    "classifier": "head.2",
}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _CFG for name in ("sdpnet_l", "sdpnet_xl", "sdpnet_xxl")})


@register_model
def sdpnet_l(pretrained: bool = False, **options: Any) -> TimmSdPNet:
    """5 conv and 7 transformer blocks, 55.1 M parameters."""
    return _create("sdpnet_l", pretrained, **options)


@register_model
def sdpnet_xl(pretrained: bool = False, **options: Any) -> TimmSdPNet:
    """5 conv and 10 transformer blocks, 76.4 M parameters."""
    return _create("sdpnet_xl", pretrained, **options)


@register_model
def sdpnet_xxl(pretrained: bool = False, **options: Any) -> TimmSdPNet:
    """20 conv and 10 transformer blocks, 85.9 M parameters."""
    return _create("sdpnet_xxl", pretrained, **options)
