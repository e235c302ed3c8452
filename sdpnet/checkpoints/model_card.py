"""`model.json`, the card beside a model's weights, with all that a user of the weights needs to know."""

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
    """All that a user of a model's weights needs to know.

    Cards of earlier versions lack the last three attributes.

    Attributes:
        model: the shape of the model.
        classes: `classes[label]` is the name of a class; there are at most as many names as the model has outputs.
        image_size: the image size of the training, in pixels a side; a multiple of the patch size.
        centre_fraction: the fraction of the shorter side that evaluation keeps, in (0, 1].
        mean, std: the values by which images are normalised, for RGB in [0, 1].
        metrics: the scores of the last evaluation, by name.
        weights: "ema" for averaged weights, "raw" for those of the last step.
        preprocessing: the steps that were applied to the images before the crop.
        weights_sha256: the SHA-256 of `model.safetensors` in hexadecimal, or "" where it is not known.

    Raises:
        UserError: a value is out of range.
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
        patch, num_outputs, size = self.model.patch_size, self.model.num_classes, self.image_size
        require(type(size) is int and size % patch == 0, "image_size", size, f"a multiple of the patch size {patch}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            ok = isinstance(values, tuple) and len(values) == 3 and all(map(_is_number, values))
            require(ok, name, _shortened(values), "three numbers")
        require(_is_number(self.centre_fraction), "centre_fraction", _shortened(self.centre_fraction), "a number")
        DataOptions(image_size=size, centre_fraction=self.centre_fraction)
        AugmentOptions(mean=self.mean, std=self.std)
        require(
            1 <= len(self.classes) <= num_outputs,
            "classes",
            f"{len(self.classes)} names",
            f"1 to {num_outputs}, as the model",
        )
        for name in self.classes:
            require(isinstance(name, str), "classes", _shortened(name), "text")
        for name, value in self.metrics.items():
            ok = isinstance(name, str) and type(value) in (int, float)
            require(ok, f"metrics.{_shortened(name)}", _shortened(value), "a number")
        require(self.weights in ("raw", "ema"), "weights", _shortened(self.weights), "raw or ema")
        require(isinstance(self.weights_sha256, str), "weights_sha256", _shortened(self.weights_sha256), "text")


def card_text(card: ModelCard) -> str:
    """The content of `model.json`."""
    return f"{json.dumps(asdict(card), indent=1)}\n"


def read_card(path: Path) -> ModelCard:
    """The card in a file. Raises `UserError` if the content is not a card, and `OSError` if the file cannot be read."""
    try:
        return parse_card(json.loads(read_small(path).decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a model's card: {_reason(error)}") from None


def parse_card(raw: Any) -> ModelCard:
    """The card in parsed JSON or in a checkpoint. Raises `UserError` if it is not a card."""
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
    """The value for a message, without the middle where it is long."""
    if isinstance(value, (Mapping, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = hex(value)
    return value if len(text) <= 80 else f"{text[:40]}...{text[-10:]}"
