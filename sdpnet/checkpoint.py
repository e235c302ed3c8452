"""What a run leaves on disk: checkpoints to resume from, and the finished model for sharing.

A file has its final name only when it is complete: it is written beside it, synced, renamed, and the directory synced.
Loading never unpickles code (`torch.load(weights_only=True)`, safetensors and JSON).
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.errors import UserError
from pipelines.publish import partial_path, publish
from sdpnet.model import ModelOptions, SdPNet

__all__ = [
    "ModelCard",
    "latest_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "save_checkpoint",
    "save_model",
    "write_atomically",
]

_NAME = re.compile(r"step_(\d+)\.pt")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)`, waits for the disk, then gives the file its name."""
    temporary = partial_path(path)
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    publish(path)


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes `directory/step_XXXXXXXX.pt` and removes all but the newest `keep` checkpoints."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step_{step:08d}.pt"
    write_atomically(path, lambda temporary: torch.save(state, temporary))
    for old in _checkpoints(directory)[:-keep]:
        old.unlink()
    return path


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def _checkpoints(directory: Path) -> list[Path]:
    names = directory.iterdir() if directory.is_dir() else ()
    return sorted((p for p in names if _NAME.fullmatch(p.name)), key=lambda p: int(p.stem.removeprefix("step_")))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU. Raises `UserError` for anything else."""
    try:
        if not zipfile.is_zipfile(path):  # torch's older format is a bare pickle stream
            raise ValueError("damaged, or not written by torch.save")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: not a readable checkpoint ({reason[0]})") from None
    if not isinstance(state, dict) or not {"model", "optimizer", "scaler", "cursor", "order", "evaluation"} <= set(
        state
    ):
        raise UserError(f"{path}: not a checkpoint of sdpnet")
    return state


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copies weights into the model. Raises `UserError`, naming the first difference, when they are another model's."""
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
    model.load_state_dict(weights)


@dataclass(frozen=True)
class ModelCard:
    """`model.json`: what a user of the weights needs to know. `metrics` are those of the last evaluation."""

    model: ModelOptions
    classes: tuple[str, ...]
    image_size: int
    centre_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    metrics: dict[str, float]


def save_model(directory: Path, model: SdPNet, card: ModelCard) -> None:
    """Writes `model.safetensors` and `model.json`."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(directory / "model.safetensors", lambda path: save_file(weights, path))
    text = json.dumps(asdict(card), indent=1) + "\n"
    write_atomically(directory / "model.json", lambda path: path.write_text(text, encoding="utf-8"))


def load_model(where: str | Path) -> tuple[SdPNet, ModelCard]:
    """Loads a finished model, in eval mode, from a run directory or the path of its `model.safetensors`.

    Raises `UserError` when there is none, or it is damaged or inconsistent.
    """
    path = Path(where)
    weights_path = path / "model.safetensors" if path.is_dir() else path
    card_path = weights_path.with_name("model.json")
    for needed in (weights_path, card_path):
        if not needed.is_file():
            raise UserError(
                f"{needed}: not there; give the directory of a finished run (or finish it with train --resume)"
            )
    try:
        raw = json.loads(card_path.read_text(encoding="utf-8"))
        card = ModelCard(
            model=ModelOptions(**raw["model"]),
            classes=tuple(raw["classes"]),
            image_size=int(raw["image_size"]),
            centre_fraction=float(raw["centre_fraction"]),
            mean=tuple(raw["mean"]),
            std=tuple(raw["std"]),
            metrics=dict(raw["metrics"]),
        )
        weights = load_file(weights_path)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{weights_path}: cannot be read ({type(error).__name__}: {error})") from None
    model = SdPNet(card.model)
    load_weights(model, weights, weights_path)
    return model.eval(), card
