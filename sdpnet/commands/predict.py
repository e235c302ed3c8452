"""Prediction, and command `sdpnet predict`: the five most likely classes of each image file.

files and folders -> threads that read, decode and crop -> batches of uint8 -> the model -> results in input order
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from sdpnet.checkpoints.model import ModelCard, load_model
from sdpnet.commands.image_inputs import Missing, SkippedFiles, find_images
from sdpnet.execution.threads import use_threads
from sdpnet.flags.predict import add_arguments
from sdpnet.model.sdpnet import SdPNet
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.errors import UserError, printable, require
from sdpnet.pipelines.machine import usable_cores
from sdpnet.pipelines.options import AugmentOptions
from sdpnet.pipelines.plan import Plan
from sdpnet.pipelines.terminal.readable_names import readable_names
from sdpnet.pipelines.terminal.status_line import StatusLine
from sdpnet.reporting.output import say, say_json

__all__ = ["Prediction", "Result", "add_arguments", "predict", "run"]

_MAX_THREADS: Final = 16  # a thread holds one decoded image


@dataclass(frozen=True)
class Prediction:
    """One class and its probability in [0, 1].

    Attributes:
        label: the number of the class.
        class_name: the name of the class in the shard set.
        name: the readable name of the class (`readable_names`).
        probability: the softmax over all classes of the model.
    """

    label: int
    class_name: str
    name: str
    probability: float


@dataclass(frozen=True)
class Result:
    """The result for one input: the most likely classes in descending order, or the reason why there are none."""

    path: str
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None


def predict(
    model: SdPNet,
    card: ModelCard,
    inputs: Iterable[str | os.PathLike[str] | Missing],
    *,
    batch_size: int = 32,
    top: int = 5,
    device: torch.device | None = None,
) -> Iterator[Result]:
    """Predicts the most likely classes of image files, which are preprocessed and cropped as in evaluation.

    Memory holds at most a few batches of crops, and one decoded image for each thread.

    Args:
        model: a model from `load_model`. It is moved to `device`.
        card: the card of the model.
        inputs: paths of files, and `Missing` entries of `find_images`.
        batch_size: the number of images in a batch.
        top: the number of classes for each image.
        device: by default, the device of the model.

    Yields:
        A result for each input, in their order, whenever a batch is complete. The result of a file that cannot be read
        or decoded has an error.
    """
    device = device or next(model.parameters()).device
    model = model.to(device).to(memory_format=torch.channels_last)
    names = readable_names(card.classes)
    stage = DeviceStage(
        AugmentOptions(mean=card.mean, std=card.std), card.model.num_classes, torch.float32, train=False
    )
    crops = _crops(card, inputs, ahead=2 * batch_size)
    while chunk := list(islice(crops, batch_size)):
        images = [crop for _, crop in chunk if isinstance(crop, torch.Tensor)]
        found = iter(_likeliest(model, stage, torch.stack(images).to(device), card, names, top) if images else ())
        for path, crop in chunk:
            yield Result(path, next(found)) if isinstance(crop, torch.Tensor) else Result(path, error=crop)


def _likeliest(
    model: SdPNet, stage: DeviceStage, images: torch.Tensor, card: ModelCard, names: tuple[str, ...], top: int
) -> list[tuple[Prediction, ...]]:
    zeros = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    sizes = np.full((len(images), 2), card.image_size, np.int32)
    plan = Plan(seed=0, sizes=sizes, batch_size=len(images), image_size=card.image_size, order="sequential").batch(0, 0)
    with torch.inference_mode():
        inputs, _ = stage(Batch(images, zeros, zeros, zeros.bool(), plan))
        probabilities = model(inputs).float().softmax(dim=1)[:, : len(card.classes)]
        best = probabilities.topk(min(top, len(card.classes)), dim=1)
    return [
        tuple(Prediction(i, card.classes[i], names[i], p) for p, i in zip(*row, strict=True))
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _crops(
    card: ModelCard, inputs: Iterable[str | os.PathLike[str] | Missing], ahead: int
) -> Iterator[tuple[str, torch.Tensor | str]]:
    """Yields each input and its crop, uint8 (image_size, image_size, 3), or an error; `ahead` are in progress."""
    pool = ThreadPoolExecutor(min(_MAX_THREADS, len(usable_cores())), "decode")
    begun: deque[tuple[str, Future[torch.Tensor] | str]] = deque()

    def oldest() -> tuple[str, torch.Tensor | str]:
        path, crop = begun.popleft()
        if isinstance(crop, str):
            return path, crop
        try:
            return path, crop.result()
        except (UserError, MemoryError) as error:
            return path, str(error) or "too large for the memory that is left; reduce it"

    try:
        for given in inputs:
            if isinstance(given, Missing):
                begun.append((given.path, given.reason))
            else:
                path = os.fspath(given)
                begun.append((path, pool.submit(_crop, path, card)))
            if len(begun) >= ahead:
                yield oldest()
        while begun:
            yield oldest()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _crop(path: str, card: ModelCard) -> torch.Tensor:
    """The crop of one image file as in evaluation. Raises `UserError`; its message does not name the file."""
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
        data = Path(path).read_bytes() if is_file else b""  # reading a pipe could wait forever
    except (OSError, ValueError) as error:  # ValueError: the name has a null byte
        raise UserError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not is_file:
        raise UserError("not a file")
    image = torch.from_numpy(np.require(card.preprocessing.pixels(data), requirements="W")).permute(2, 0, 1)
    size = [card.image_size, card.image_size]
    plan = Plan(
        seed=0,
        sizes=np.array([image.shape[1:]], np.int32),
        batch_size=1,
        image_size=card.image_size,
        order="sequential",
        centre_fraction=card.centre_fraction,
    ).batch(0, 0)
    (box,) = plan.crop_boxes.tolist()
    crop = resized_crop(image, *box, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
    return crop.permute(1, 2, 0).contiguous()


def run(arguments: argparse.Namespace) -> int:
    """Prints each result as soon as it is known. Returns the exit status, which `add_arguments` describes."""
    require(arguments.batch_size >= 1, "--batch-size", arguments.batch_size, "at least 1")
    device = _device(arguments.device)
    if device.type == "cpu" and (chosen := use_threads()).reduced:
        print(chosen, file=sys.stderr)
    model, card = load_model(arguments.model)
    skipped = SkippedFiles()
    found = find_images(arguments.images, skipped)
    try:
        bad, total = _print_all(predict(model, card, found, batch_size=arguments.batch_size, device=device), arguments)
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        return 141
    if skipped.count:
        many = skipped.count > 1
        what = f"{skipped.count:,} files that are not images" if many else "1 file that is not an image"
        print(printable(f"skipped in folders: {what}, {'such as ' * many}{skipped.example}"), file=sys.stderr)
    if bad and total > 1:
        print(f"{bad:,} of {total:,} images could not be predicted", file=sys.stderr)
    return 0 if not bad else 2 if bad == total else 1


def _print_all(results: Iterator[Result], arguments: argparse.Namespace) -> tuple[int, int]:
    """Prints the results. Returns the number of images that could not be predicted, and the total number."""
    bad = total = 0
    of_total = f" of {sum(1 for _ in find_images(arguments.images)):,}" if sys.stderr.isatty() else ""
    began = time.monotonic()
    with StatusLine() as status:
        for result in results:
            status("")
            total += 1
            if result.error is not None:
                bad += 1
                print(f"error: {printable(f'{result.path}: {result.error}')}", file=sys.stderr)
            if arguments.json:
                say_json(_facts(result))
            elif result.error is None:
                lines = [f"  {prediction.probability:7.2%}  {prediction.name}" for prediction in result.predictions]
                say(result.path, *lines)
            status(f"{total:,}{of_total} images, {total / (time.monotonic() - began):,.1f} images/s")
    return bad, total


def _facts(result: Result) -> dict[str, object]:
    if result.error is not None:
        return {"file": result.path, "error": printable(result.error)}
    predictions = [
        {"label": one.label, "class": one.class_name, "name": one.name, "probability": one.probability}
        for one in result.predictions
    ]
    return {"file": result.path, "predictions": predictions}


def _device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable GPU here; take --device cpu or auto")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")
