"""Fine-tuning: a new model starts from another run's weights, at another resolution or with other classes.

Everything else must be the same: the first difference is named, and nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

from sdpnet.checkpoints.class_names import first_difference
from sdpnet.checkpoints.model import load_model, load_weights
from sdpnet.model.positions import resample_grid
from sdpnet.model.sdpnet import ModelOptions, SdPNet
from sdpnet.pipelines.errors import UserError

__all__ = ["start_from"]

MAY_DIFFER = ("num_classes", "grid_size", "dropout", "drop_path")
CLASSIFIER = ("head.2.weight", "head.2.bias")


def start_from(
    model: SdPNet,
    where: str | Path,
    classes: Sequence[str] | None = None,
    other_classes: Literal["refuse", "keep", "new_head"] = "refuse",
) -> str:
    """Copies another run's weights into a new model; returns one line that says what became of them.

    `where` is what `sdpnet.checkpoints.model.load_model` takes. A learned position embedding is resampled where
    `grid_size` differs. Where the number of classes differs, the head's last layer keeps the new model's own start; as
    in timm, the rest is taken. Dropout and stochastic depth may differ; so may LayerScale's start, but not whether
    there is one.

    `classes` are the names of the new model's classes (None: unknown). Where there are as many as the weights were
    trained on, but others or in another order, `other_classes` decides: see `sdpnet.config.options.TrainOptions`.

    Raises `UserError`, naming the first difference, when the weights are of another model in any other respect.
    """
    source, card = load_model(where)
    there, here = source.options, model.options
    for name in (field.name for field in fields(ModelOptions) if field.name not in MAY_DIFFER):
        was, wanted = getattr(there, name), getattr(here, name)
        if was != wanted and not (name == "layer_scale" and was and wanted):
            raise UserError(f"{where}: was trained with model.{name} {was!r}, not {wanted!r}: its weights do not fit")
    weights, changes, kept = source.state_dict(), [], ""
    if there.position == "learned" and there.grid_size != here.grid_size:
        weights["position_embedding"] = resample_grid(weights["position_embedding"], (here.grid_size, here.grid_size))
        sizes = f"{there.grid_size} x {there.grid_size} to {here.grid_size} x {here.grid_size}"
        changes.append(f"position embedding resampled from {sizes} patches")
    other_number = there.num_classes != here.num_classes
    difference = None if classes is None or other_number else first_difference(card.classes, classes)
    if difference and other_classes == "refuse":
        raise UserError(
            f"{where}: was trained on other classes: {difference}; set train.other_classes=new_head to start the "
            "head's last layer anew, or =keep to keep it"
        )
    if other_number or (difference and other_classes == "new_head"):
        own = model.state_dict()
        weights |= {name: own[name] for name in CLASSIFIER}
        why = f"{there.num_classes} -> {here.num_classes} classes" if other_number else difference
        changes.append(f"the head's last layer starts anew ({why})")
    elif difference:
        kept = f"; the head is kept although its classes are others: {difference}"
    load_weights(model, weights, Path(where))
    return f"weights taken from {where}{', except: ' if changes else ''}{'; '.join(changes)}{kept}"
