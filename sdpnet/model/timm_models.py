"""SdP-Net in timm: importing this module registers sdpnet_tiny, sdpnet_l, sdpnet_xl and sdpnet_xxl.

    import timm
    import sdpnet.model.timm_models  # timm has no entry points: it finds the models only after this import

    model = timm.create_model("sdpnet_xl", checkpoint_path="RUN/model.safetensors")

Parameters have the same names as in `sdpnet.model.sdpnet`. timm reads the weights but not the `model.json` beside them.
Options of the model that differ from those of the named model must therefore be passed as keywords (num_classes=100,
position="rope", ...). Passing all of them works too: `**json.loads(Path("RUN/model.json").read_text())["model"]`.

`features_only=True` returns the features of the patches after chosen blocks, as for timm's vision transformers. Conv
blocks are counted first, then transformer blocks. This module needs the extra `timm` (in a checkout:
pip install -e '.[timm]').
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sdpnet.model.sdpnet import SdPNet, create_model_options
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.options import AugmentOptions, DataOptions

__all__ = ["TimmSdPNet", "sdpnet_l", "sdpnet_tiny", "sdpnet_xl", "sdpnet_xxl"]


class TimmSdPNet(SdPNet):
    """`SdPNet` with the methods that timm expects of a model.

    With `num_classes=0` the model has no last layer and returns (B, head_hidden). `drop_rate` and `drop_path_rate` are
    timm's names for `dropout` and `drop_path`.
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
        blocks = [f"conv_blocks.{number}" for number in range(self.options.conv_blocks)]
        blocks += [f"transformer_blocks.{number}" for number in range(self.options.transformer_blocks)]
        info = {"num_chs": self.options.dim, "reduction": self.options.patch_size}
        self.feature_info = [{**info, "module": block} for block in blocks]
        if num_classes == 0:
            self.reset_classifier(0)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, H, W) -> tokens [class, registers, patches] (B, 1 + R + N, dim)."""
        return self.norm(self.tokens(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The features after chosen blocks, as timm's vision transformers return them.

        Args:
            x: normalised images (B, 3, H, W).
            indices: the numbers of the blocks from 0, with conv blocks first and negative numbers from the end; or the
                number of last blocks; or None for all blocks.
            return_prefix_tokens: whether each feature is a pair with the class and register tokens (B, 1 + R, dim).
                Only transformer blocks have them.
            norm: whether the final norm is applied to the features of transformer blocks.
            stop_early: whether the blocks after the last chosen one are skipped.
            output_fmt: "NCHW" for (B, dim, H / patch_size, W / patch_size), "NLC" for (B, N, dim).
            intermediates_only: whether only the list of features is returned.

        Returns:
            (tokens of `forward_features`, list of features in the order of the blocks), or the list alone. If
            `stop_early` ends among the conv blocks, the first element is the output (B, dim, h, w) of the last block.

        Raises:
            UserError: `output_fmt` is another one, or prefix tokens of conv blocks are asked for.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt = {output_fmt!r}: must be 'NCHW' or 'NLC'")
        conv, transformer = len(self.conv_blocks), len(self.transformer_blocks)
        chosen = _chosen(conv + transformer, indices)
        last = max(chosen)
        if return_prefix_tokens and min(chosen) < conv:
            raise UserError(
                f"return_prefix_tokens: block {min(chosen)} is a conv block, which has no class token; choose from "
                f"{conv} on"
            )
        prefix = 1 + self.options.registers
        features: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        x = self.patch_norm(self.patch(x))
        rows, columns = x.shape[2:]
        for number, block in enumerate(self.conv_blocks):
            if stop_early and number > last:
                break
            x = self._run(block, x)
            if number in chosen:
                features.append((x if output_fmt == "NCHW" else x.flatten(2).transpose(1, 2), None))
        if transformer and not (stop_early and last < conv):
            x, rotary = self.encoder_input(x)
            for number, block in enumerate(self.transformer_blocks, conv):
                if stop_early and number > last:
                    break
                x = self._run(block, x, rotary)
                if number in chosen:
                    tokens = self.norm(x) if norm else x
                    patches = tokens[:, prefix:]
                    if output_fmt == "NCHW":
                        patches = patches.transpose(1, 2).reshape(len(x), -1, rows, columns).contiguous()
                    features.append((patches, tokens[:, :prefix]))
            x = self.norm(x)
        found = features if return_prefix_tokens else [patches for patches, _ in features]
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last chosen one and, if asked for, norm and head. Returns the chosen numbers."""
        conv = len(self.conv_blocks)
        chosen = _chosen(conv + len(self.transformer_blocks), indices)
        last = max(chosen)
        self.conv_blocks = self.conv_blocks[: last + 1]
        self.transformer_blocks = self.transformer_blocks[: max(0, last + 1 - conv)]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens -> logits (B, num_classes); with `pre_logits` the head's hidden layer (B, head_hidden)."""
        hidden, activation, last = self.head
        x = activation(hidden(x[:, 0]))
        return x if pre_logits else last(x)

    def get_classifier(self) -> nn.Module:
        return self.head[2]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer by a new one, or by none for 0. The head always takes the class token."""
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
        """The patterns by which timm finds the depth of a parameter, for layer-wise learning rates."""
        return {
            "stem": r"^patch|^class_token|^registers|^position_embedding",
            "conv_blocks": r"^conv_blocks\.(\d+)",
            "transformer_blocks": [(r"^transformer_blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }


def _chosen(blocks: int, indices: int | Sequence[int] | None) -> list[int]:
    """The numbers of the blocks for `indices` of `forward_intermediates`. Raises `UserError` if one does not exist."""
    if indices is None:
        return list(range(blocks))
    if isinstance(indices, int):
        require(1 <= indices <= blocks, "out_indices", indices, f"1 to {blocks}, the last blocks, or their numbers")
        return list(range(blocks - indices, blocks))
    ok = len(indices) > 0 and all(-blocks <= index < blocks for index in indices)
    require(ok, "out_indices", indices, f"numbers of its {blocks} blocks, from 0, or negative ones from the end")
    return [index % blocks for index in indices]


def _create(name: str, pretrained: bool, **options: Any) -> TimmSdPNet:
    features = {"out_indices": 3, "feature_cls": "getter"}  # as in timm's vision transformers
    return build_model_with_cfg(TimmSdPNet, name, pretrained, name=name, feature_cfg=features, **options)


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
default_cfgs = generate_default_cfgs(
    {
        "sdpnet_tiny.untrained": {**_CFG, "input_size": (3, 64, 64)},  # the size in configs/demo.yaml and debug.yaml
        **{f"{name}.untrained": _CFG for name in ("sdpnet_l", "sdpnet_xl", "sdpnet_xxl")},
    }
)


@register_model
def sdpnet_tiny(pretrained: bool = False, **options: Any) -> TimmSdPNet:
    """A small model with patches of 8 pixels, for experiments and the demo."""
    return _create("sdpnet_tiny", pretrained, **options)


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
