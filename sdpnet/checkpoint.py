"""What a run leaves on disk: checkpoints to resume from, and the finished model for sharing.

A file has its final name only when it is complete: it is written beside it, synced, renamed, and the directory synced.
Loading never unpickles code (`torch.load(weights_only=True)`, safetensors and JSON).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from pipelines.errors import UserError
from pipelines.preprocessing import Preprocessing
from pipelines.publish import publish_bytes
from sdpnet.checkpoint_directory import Checkpoints, latest_checkpoint
from sdpnet.checkpoint_file import load_checkpoint, refusals, write_atomically
from sdpnet.model import ModelOptions, SdPNet
from sdpnet.muon import MuonAdamW
from sdpnet.resume import load_newest, require_same_order, require_same_step

__all__ = [
    "Checkpoints",
    "ModelCard",
    "latest_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_newest",
    "load_optimizer",
    "load_weights",
    "require_same_order",
    "require_same_step",
    "save_model",
    "write_atomically",
]


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copies weights into the model. Raises `UserError`, naming the first difference, when they are another model's."""
    _require_same_model(model, weights, path)
    model.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Loads the state of an optimizer over the same parameters: its moments and counts of steps, not its settings.

    Raises `UserError` when it is another one's.
    """
    try:
        parts = optimizer.parts.values() if isinstance(optimizer, MuonAdamW) else [optimizer]
        own = [
            {key: value for key, value in group.items() if key != "params"}
            for part in parts
            for group in part.param_groups
        ]
        optimizer.load_state_dict(state)
        groups = [(part, group) for part in parts for group in part.param_groups]
        for (part, group), settings in zip(groups, own, strict=True):
            group.update(settings)  # as the config and the machine have them now
            for parameter in group["params"]:
                _fit_state(part.state.get(parameter, {}), parameter, on_device=bool(group.get("fused")))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path}: holds the state of another optimizer ({reason[0]}); use the config that it was trained with"
        ) from None


def _fit_state(values: dict[str, Any], parameter: torch.Tensor, *, on_device: bool) -> None:
    """Gives a parameter's loaded state its strides, and its count of steps the place where the optimizer wants it."""
    for name, value in values.items():
        if not torch.is_tensor(value):
            continue
        if value.ndim == parameter.ndim and value.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(value.shape)} where the weight is {tuple(parameter.shape)}")
        if name == "step":
            values[name] = value.to(parameter.device if on_device else "cpu", torch.float32)
        elif value.ndim == parameter.ndim:
            values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _require_same_model(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    for name in (*own, *weights):
        if name not in weights or name not in own:
            side = "lacks" if name not in weights else "has, and this model has not,"
            raise UserError(f"{path}: is of another model: it {side} {name}; use the config that it was trained with")
        if own[name].shape != weights[name].shape:
            raise UserError(
                f"{path}: is of another model: {name} is {tuple(weights[name].shape)} there, "
                f"{tuple(own[name].shape)} here; use the config that it was trained with"
            )
        if own[name].is_floating_point() != weights[name].is_floating_point():
            raise UserError(
                f"{path}: {name} is {weights[name].dtype}, not {own[name].dtype}: not weights of this model"
            )


@dataclass(frozen=True)
class ModelCard:
    """`model.json`: what a user of the weights needs to know.

    `metrics` are those of the last evaluation; `weights` says whether the weights are averaged ones; `preprocessing` is
    what was done to the images before the crop. Cards of earlier versions lack the last two.
    """

    model: ModelOptions
    classes: tuple[str, ...]
    image_size: int
    centre_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    metrics: dict[str, float]
    weights: Literal["raw", "ema"] = "raw"
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


def save_model(directory: Path, model: SdPNet, card: ModelCard, ema: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes `model.safetensors` and `model.json`: of the averaged weights `ema`, by name, where there are any.

    What `ema` lacks (a buffer) is taken from the model. Raises `UserError` when the system refuses.
    """
    state = {**model.state_dict(), **(ema or {})}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    facts = {**asdict(card), "weights": "raw" if ema is None else "ema"}
    for name, content in (
        ("model.safetensors", save(weights)),
        ("model.json", f"{json.dumps(facts, indent=1)}\n".encode()),
    ):
        with refusals(directory / name):
            publish_bytes(directory / name, content)


def load_model(
    where: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> tuple[SdPNet, ModelCard]:
    """Loads a model, in eval mode, with its card.

    `where` is a finished model (`model.safetensors` or the `model.json` beside it), a checkpoint of a run, or a run's
    directory: then it is the finished model, or the newest checkpoint that can be read (`say` gets a line for each that
    cannot). `weights`: "ema" takes averaged weights where there are any, "raw" those of the last step.

    Raises `UserError` when there is none, or it is damaged or inconsistent.
    """
    path = Path(where)
    if path.name == "model.json":
        path = path.with_name("model.safetensors")
    if path.is_dir():
        run, path = path, path / "model.safetensors"
        if not path.exists():
            newest = load_newest(run / "checkpoints", say)
            if newest is not None:
                return _from_checkpoint(*newest, weights)
    elif path.suffix != ".safetensors" and path.exists():
        return _from_checkpoint(path, load_checkpoint(path), weights)
    card_path = path.with_name("model.json")
    for needed in (path, card_path):
        if not needed.is_file():
            raise UserError(f"{needed}: not there; give the directory of a run, or a checkpoint in its checkpoints/")
    try:
        card = _card(json.loads(card_path.read_text(encoding="utf-8")))
        found = load_file(path)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    if weights == "raw" and card.weights == "ema":
        newest = load_newest(path.parent / "checkpoints", say)
        if newest is None:
            raise UserError(f"{path}: holds averaged weights, and there is no checkpoint with those of the last step")
        return _from_checkpoint(*newest, weights)
    return _build(path, found, card), card


def _from_checkpoint(path: Path, state: dict[str, Any], weights: Literal["ema", "raw"]) -> tuple[SdPNet, ModelCard]:
    if "card" not in state:
        raise UserError(f"{path}: is of an earlier version and does not say of which model; finish its run first")
    averaged = state.get("ema") if weights == "ema" else None
    try:
        card = _card({**state["card"], "weights": "raw" if averaged is None else "ema"})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None
    return _build(path, {**state["model"], **(averaged or {})}, card), card


def _card(raw: dict[str, Any]) -> ModelCard:
    return ModelCard(
        model=ModelOptions(**raw["model"]),
        classes=tuple(raw["classes"]),
        image_size=int(raw["image_size"]),
        centre_fraction=float(raw["centre_fraction"]),
        mean=tuple(raw["mean"]),
        std=tuple(raw["std"]),
        metrics=dict(raw["metrics"]),
        weights=raw.get("weights", "raw"),
        preprocessing=Preprocessing(**raw.get("preprocessing", {})),
    )


def _build(path: Path, weights: dict[str, torch.Tensor], card: ModelCard) -> SdPNet:
    """The model of the card with these weights. A card that claims more than the weights have costs no memory."""
    options = card.model
    try:
        if options.conv_blocks + options.transformer_blocks > len(weights):
            raise ValueError("more blocks than weights")
        with torch.device("meta"):
            claimed = SdPNet(options)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: its card describes no model ({reason[0]})") from None
    _require_same_model(claimed, weights, path)
    model = SdPNet(options)
    model.load_state_dict(weights)
    return model.eval()
