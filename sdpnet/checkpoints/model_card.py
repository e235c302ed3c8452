"""`model.json`, the card beside a model's weights: what a user of them needs to know, checked as a config is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdpnet.model.sdpnet import ModelOptions
from sdpnet.pipelines.errors import UserError, require
from sdpnet.pipelines.files.small import read_small
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.options import AugmentOptions, DataOptions

__all__ = ["ModelCard", "card_text", "parse_card", "read_card"]


@dataclass(frozen=True)
class ModelCard:
    """What a user of the weights needs to know.

    Attributes:
        model: how the model is built.
        classes: `classes[label]` is a class's name; no more of them than the model has.
        image_size: pixels a side, of its training; a multiple of the patch size.
        centre_fraction: of the shorter side that evaluation keeps, in (0, 1].
        mean, std: of RGB in [0, 1], by which images are normalised.
        metrics: those of the last evaluation.
        weights: whether the weights are averaged ones ("ema") or those of the last step.
        preprocessing: what was done to the images before the crop.
        weights_sha256: of `model.safetensors`, hex; "" where nobody says.

    Cards of earlier versions lack the last three. Raises `UserError` for what is out of range.
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
    weights_sha256: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        patch, most, size = self.model.patch_size, self.model.num_classes, self.image_size
        require(type(size) is int and size % patch == 0, "image_size", size, f"a multiple of the patch size {patch}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            ok = isinstance(values, tuple) and len(values) == 3 and all(map(_is_number, values))
            require(ok, name, _shortened(values), "three numbers")
        require(_is_number(self.centre_fraction), "centre_fraction", _shortened(self.centre_fraction), "a number")
        DataOptions(image_size=size, centre_fraction=self.centre_fraction)
        AugmentOptions(mean=self.mean, std=self.std)
        require(1 <= len(self.classes) <= most, "classes", f"{len(self.classes)} names", f"1 to {most}, as the model")
        for name in self.classes:
            require(isinstance(name, str), "classes", _shortened(name), "text")
        for name, value in self.metrics.items():
            ok = isinstance(name, str) and type(value) in (int, float)
            require(ok, f"metrics.{_shortened(name)}", _shortened(value), "a number")
        require(self.weights in ("raw", "ema"), "weights", _shortened(self.weights), "raw or ema")
        require(isinstance(self.weights_sha256, str), "weights_sha256", _shortened(self.weights_sha256), "text")


def card_text(card: ModelCard) -> str:
    """As it stands in `model.json`."""
    return f"{json.dumps(asdict(card), indent=1)}\n"


def read_card(path: Path) -> ModelCard:
    """The card in a file. Raises `UserError` for what is none, and `OSError` where it cannot be read."""
    try:
        return parse_card(json.loads(read_small(path).decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a model's card: {_reason(error)}") from None


def parse_card(raw: Any) -> ModelCard:
    """The card that JSON, or a checkpoint, holds. Raises `UserError` for what is none."""
    try:
        return ModelCard(
            model=ModelOptions(**raw["model"]),
            classes=tuple(raw["classes"]),
            image_size=raw["image_size"],
            centre_fraction=raw["centre_fraction"],
            mean=_tuple(raw["mean"]),
            std=_tuple(raw["std"]),
            metrics=dict(raw["metrics"]),
            weights=raw.get("weights", "raw"),
            preprocessing=Preprocessing(**raw.get("preprocessing", {})),
            weights_sha256=raw.get("weights_sha256", ""),
        )
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"it lacks {_shortened(error.args[0])}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(_reason(error)) from None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _shortened(value: Any) -> Any:
    """A value as a message shows it, without the middle of a long one."""
    if isinstance(value, (Mapping, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # thousands of digits
        text = hex(value)
    return value if len(text) <= 80 else f"{text[:40]}...{text[-10:]}"
