"""Fine-tuning: a new model starts from the weights of another run, at another resolution or with other classes.

All other options of the model must be equal; otherwise an error names the first difference. No weight is skipped
silently.
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
    """Copies the weights of another run into a new model.

    If `grid_size` differs, a learned position embedding is resampled. If the number of classes differs, the last layer
    of the head keeps its new initial values, and all other weights are copied, as in timm. The rates of dropout and
    stochastic depth may differ, and so may the initial value of LayerScale, but not whether the model has LayerScale.

    Args:
        where: a model as for `sdpnet.checkpoints.model.load_model`.
        classes: the names of the new model's classes, or None if they are not known.
        other_classes: what happens if there are as many classes as the weights were trained on, but with other names or
            in another order: see `sdpnet.config.options.TrainOptions`.

    Returns:
        A line for the user that says which weights were copied and which were not.

    Raises:
        UserError: the weights are those of another model in any other respect. The message names the first difference.
    """
    source, card = load_model(where)
    theirs, ours = source.options, model.options
    for name in (field.name for field in fields(ModelOptions) if field.name not in MAY_DIFFER):
        was, wanted = getattr(theirs, name), getattr(ours, name)
        if was != wanted and not (name == "layer_scale" and was and wanted):
            raise UserError(f"{where}: was trained with model.{name} {was!r}, not {wanted!r}: its weights do not fit")
    weights, changes, kept = source.state_dict(), [], ""
    if theirs.position == "learned" and theirs.grid_size != ours.grid_size:
        weights["position_embedding"] = resample_grid(weights["position_embedding"], (ours.grid_size, ours.grid_size))
        sizes = f"{theirs.grid_size} x {theirs.grid_size} to {ours.grid_size} x {ours.grid_size}"
        changes.append(f"position embedding resampled from {sizes} patches")
    other_number = theirs.num_classes != ours.num_classes
    difference = None if classes is None or other_number else first_difference(card.classes, classes)
    if difference and other_classes == "refuse":
        raise UserError(
            f"{where}: was trained on other classes: {difference}; set train.other_classes=new_head to start the "
            "head's last layer anew, or =keep to keep it"
        )
    if other_number or (difference and other_classes == "new_head"):
        own = model.state_dict()
        weights |= {name: own[name] for name in CLASSIFIER}
        why = f"{theirs.num_classes} -> {ours.num_classes} classes" if other_number else difference
        changes.append(f"the head's last layer starts anew ({why})")
    elif difference:
        kept = f"; the head is kept although its classes are others: {difference}"
    load_weights(model, weights, Path(where))
    return f"weights taken from {where}{', except: ' if changes else ''}{'; '.join(changes)}{kept}"
