"""The files of a run: checkpoints to resume from, and the finished model for sharing.

A file gets its final name only when it is complete: it is written under a temporary name, synced and renamed, and then
its directory is synced. Loading never unpickles code (`torch.load(weights_only=True)`, safetensors and JSON).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from sdpnet.checkpoints.directory import Checkpoints, latest_checkpoint
from sdpnet.checkpoints.file import load_checkpoint, refusals, write_atomically
from sdpnet.checkpoints.model_card import ModelCard, card_text, parse_card, read_card
from sdpnet.checkpoints.resume import load_newest, require_same_order, require_same_step
from sdpnet.model.sdpnet import SdPNet
from sdpnet.optim.muon import MuonAdamW
from sdpnet.pipelines.errors import UserError, printable
from sdpnet.pipelines.files.atomic_write import holds, publish_bytes
from sdpnet.pipelines.files.small import read_small

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

_MOMENTS: Final = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum"})  # the state of a weight in AdamW and in Muon
_LARGEST_HEADER: Final = 1 << 26  # bytes before the tensors of a safetensors file
_LARGEST_ELEMENT: Final = 8  # bytes of a float64


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copies weights into the model. Raises `UserError`, which names the first difference, if they do not fit it."""
    _require_same_model(model, weights, path)
    model.load_state_dict(weights)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Loads the state of an optimizer over the same parameters.

    The moments, the step counts and the last learning rates are loaded. All other settings stay as the config and the
    machine have them now.

    Raises:
        UserError: the state is that of another optimizer.
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
            # Each step sets the learning rate anew. A checkpoint that is saved before the next step must still record
            # the last one, or a resumed run would write another file than an uninterrupted one.
            last = group.get("lr")
            group.update(settings)
            if isinstance(last, float):
                group["lr"] = last
            for parameter in group["params"]:
                _fit_state(part.state.get(parameter, {}), parameter, on_device=bool(group.get("fused")))
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path}: holds the state of another optimizer ({reason[0]}); use the config that it was trained with"
        ) from None


def _fit_state(values: dict[str, Any], parameter: torch.Tensor, *, on_device: bool) -> None:
    """Converts a parameter's loaded state: moments to the parameter's strides, the step count to its device.

    torch's fused optimizers want the step count on the device, all others on the CPU.
    """
    if values and set(values) not in _MOMENTS:
        raise ValueError(f"of a weight it has {', '.join(map(str, values))}")
    for name, value in values.items():
        if not torch.is_tensor(value):
            raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
        if name == "step":
            values[name] = value.reshape(()).to(parameter.device if on_device else "cpu", torch.float32)
        elif value.shape != parameter.shape or value.dtype != parameter.dtype:
            wrong, right = (f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (value, parameter))
            raise ValueError(f"{name} is {wrong} where the weight is {right}")
        else:
            values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def _require_same_model(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    own = model.state_dict()
    for name in (*own, *weights):
        if name not in weights or name not in own:
            side = "lacks" if name not in weights else "also has"
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


def save_model(directory: Path, model: SdPNet, card: ModelCard, ema: Mapping[str, torch.Tensor] | None = None) -> bool:
    """Writes `model.safetensors` and `model.json`.

    Args:
        ema: averaged weights by name, which are written instead of the model's own. Names that it lacks (buffers) are
            taken from the model.

    Returns:
        Whether a file was written; False if both files exist already with this content.

    Raises:
        UserError: the system refuses to write.
    """
    state = {**model.state_dict(), **(ema or {})}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content, written = save(weights), False
    sha256 = hashlib.sha256(content).hexdigest()
    card = replace(card, weights="raw" if ema is None else "ema", weights_sha256=sha256)
    for name, wanted in (("model.safetensors", content), ("model.json", card_text(card).encode())):
        path = directory / name
        with refusals(path):
            if not holds(path, wanted):
                publish_bytes(path, wanted)
                written = True
    return written


def load_model(
    where: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    say: Callable[[str], None] = lambda text: print(printable(text), file=sys.stderr),
) -> tuple[SdPNet, ModelCard]:
    """Loads a model, in eval mode, with its card.

    Args:
        where: a finished model (`model.safetensors` or the `model.json` beside it), a checkpoint, or the directory of a
            run. From a directory the finished model is loaded or, where there is none, the newest readable checkpoint.
        weights: "ema" takes the averaged weights where there are any, "raw" the weights of the last step.
        say: is called with one line of text for each checkpoint that cannot be read.

    Raises:
        UserError: there is no model, or its files are damaged or inconsistent.
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
            wrong = "not a file" if needed.exists() else "not there"
            raise UserError(f"{needed}: {wrong}; give the directory of a run, or a checkpoint in its checkpoints/")
    card = read_card(card_path)
    found = _read_weights(path, card)
    if weights == "raw" and card.weights == "ema":
        newest = load_newest(path.parent / "checkpoints", say)
        if newest is None:
            raise UserError(f"{path}: holds averaged weights, and there is no checkpoint with those of the last step")
        return _from_checkpoint(*newest, weights)
    return _build(path, found, card), card


def _read_weights(path: Path, card: ModelCard) -> dict[str, torch.Tensor]:
    """The tensors of the safetensors file that `card` describes. No more bytes are read than its model can have."""
    elements = sum(weight.numel() for weight in _claimed(path, card).state_dict().values())
    try:
        content = read_small(path, _LARGEST_HEADER + _LARGEST_ELEMENT * elements)
    except ValueError as error:
        raise UserError(f"{path}: not the weights of the model that model.json describes ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if card.weights_sha256 and hashlib.sha256(content).hexdigest() != card.weights_sha256:
        raise UserError(
            f"{path}: cannot be read: it is not the file that model.json was written for (checksum), so it is damaged "
            "or of another run; copy both again, or continue the run with sdpnet train --resume, which writes them anew"
        )
    try:
        weights = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {reason})") from None
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight.float()).all()):
            raise UserError(f"{path}: cannot be read ({name} is not finite)")
    return weights


def _from_checkpoint(path: Path, state: dict[str, Any], weights: Literal["ema", "raw"]) -> tuple[SdPNet, ModelCard]:
    if "card" not in state:
        raise UserError(f"{path}: is of an earlier version, without a description of the model; finish its run first")
    averaged = state.get("ema") if weights == "ema" else None
    try:
        card = parse_card({**state["card"], "weights": "raw" if averaged is None else "ema"})
    except UserError as error:
        raise UserError(f"{path}: cannot be read: its card: {error}") from None
    return _build(path, {**state["model"], **(averaged or {})}, card), card


def _build(path: Path, weights: dict[str, torch.Tensor], card: ModelCard) -> SdPNet:
    """The model of the card with these weights.

    A card that claims a larger model than the weights belong to is refused before memory is allocated for it.
    """
    _require_same_model(_claimed(path, card), weights, path)
    model = SdPNet(card.model)
    model.load_state_dict(weights)
    return model.eval()


def _claimed(path: Path, card: ModelCard) -> SdPNet:
    """The model that a card describes, without memory for its weights."""
    try:
        with torch.device("meta"):
            return SdPNet(card.model)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: its card describes no model ({reason[0]})") from None
