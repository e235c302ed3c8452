"""Prediction, and command `sdpnet predict`: image files in, the five likeliest classes out."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from pipelines.augment import DeviceStage
from pipelines.contract import AugmentOptions, Batch
from pipelines.errors import UserError
from pipelines.plan import Plan
from sdpnet.checkpoint import ModelCard, load_model
from sdpnet.model import SdPNet
from sdpnet.threads import use_threads

__all__ = ["Prediction", "add_arguments", "predict", "run"]


@dataclass(frozen=True)
class Prediction:
    """One class and its probability in [0, 1]."""

    name: str
    probability: float


def predict(model: SdPNet, card: ModelCard, paths: list[Path], top: int = 5) -> list[list[Prediction]]:
    """The `top` likeliest classes of each image, likeliest first, cropped and normalised as in evaluation.

    Raises `UserError`, naming the file, when one is missing or is no image.
    """
    images = [_load(path) for path in paths]
    sizes = np.array([image.shape[1:] for image in images], np.int32)
    plan = Plan(
        seed=0,
        sizes=sizes,
        batch_size=len(images),
        image_size=card.image_size,
        order="sequential",
        centre_fraction=card.centre_fraction,
    ).batch(0, 0)
    size = [card.image_size, card.image_size]
    crops = [
        resized_crop(image, *box, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
        for image, box in zip(images, plan.crop_boxes.tolist(), strict=True)
    ]
    zeros = torch.zeros(len(images), dtype=torch.int64)
    batch = Batch(torch.stack(crops).permute(0, 2, 3, 1), zeros, zeros, zeros.bool(), plan)
    options = AugmentOptions(mean=card.mean, std=card.std)
    inputs, _ = DeviceStage(options, card.model.num_classes, torch.float32, train=False)(batch)
    with torch.inference_mode():
        probabilities = model(inputs).softmax(dim=1)
    best = probabilities.topk(min(top, len(card.classes)), dim=1)
    return [
        [Prediction(card.classes[index], value) for value, index in zip(*row, strict=True) if index < len(card.classes)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _load(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model", required=True, type=Path, help="run directory or model.safetensors")


def run(arguments: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    if (chosen := use_threads()).reduced:
        print(chosen, file=sys.stderr)
    model, card = load_model(arguments.model)
    console = Console(highlight=False)
    for path, predictions in zip(arguments.images, predict(model, card, arguments.images), strict=True):
        console.print(f"{path}", markup=False)
        for prediction in predictions:
            console.print(f"  {prediction.probability:7.2%}  {prediction.name}", markup=False)
    return 0
