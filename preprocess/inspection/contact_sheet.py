"""The contact sheet: images of a split, each beside the same image as training sees it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from sdpnet.pipelines.errors import BackendMissingError, ShardError
from sdpnet.pipelines.images.strict_jpeg import DamagedJpegError, decode_jpeg
from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions
from sdpnet.pipelines.plan import MIX_CUTMIX, MIX_NONE, BatchPlan, MixOptions, Plan
from sdpnet.pipelines.planning.policies import Operation, in_words
from sdpnet.pipelines.shards.beton import MODE_RAW
from sdpnet.preprocess.inspection.recipe import CROP, ERASE, IMAGE_SIZE, MIX, RANDAUGMENT, RECIPE
from sdpnet.preprocess.inspection.survey import SplitSurvey

__all__ = ["ContactSheet", "Tile", "contact_sheet"]

THUMBNAIL_SIDE: Final = 224


@dataclass(frozen=True)
class Tile:
    """One image of the contact sheet.

    Attributes:
        sample_id: its number in the split.
        class_name: its own class; if it is mixed with another sample, `change` names that sample.
        height, width: the size of the stored image in pixels.
        original: a small JPEG file of the stored image.
        augmented: a small JPEG file of the augmented image; None if it could not be augmented.
        change: a description of the augmentation.
    """

    sample_id: int
    class_name: str
    height: int
    width: int
    original: bytes
    augmented: bytes | None
    change: str


@dataclass(frozen=True)
class ContactSheet:
    """Some images of a split. `note` says how they were augmented, or why they were not."""

    split: str
    tiles: tuple[Tile, ...]
    note: str


def contact_sheet(
    directory: Path, split: SplitSurvey, classes: tuple[str, ...], num_images: int, seed: int
) -> ContactSheet:
    """Makes a contact sheet of the first images that training with this seed would see.

    Images are augmented by the torchvision pipeline and the device stage. MixUp and CutMix mix pairs, so the number of
    images is even, or one, which is then not mixed. Without PyTorch or torchvision, the images are not augmented, and
    `note` gives the reason.
    """
    count = min(num_images, split.split.num_samples)
    count -= count % 2 if count > 1 else 0
    plan = Plan(seed=seed, sizes=split.reader.sizes, batch_size=count, image_size=IMAGE_SIZE, order="random")
    ids = plan.batch_ids(0, 0)[0].tolist()
    originals = [_jpeg(_original(directory, split, sample)) for sample in ids]
    try:
        augmented, decided = _augmented(directory, split.name, count, seed)
    except BackendMissingError as error:
        note = f"The images are shown as stored; they could not be augmented: {error}."
        halves: list[tuple[bytes | None, str]] = [(None, "")] * count
    else:
        assert decided.sample_ids.tolist() == ids
        note = f"Left: as stored. Right: as augmented by the seed recipe ({RECIPE})."
        halves = [(_jpeg(Image.fromarray(pixels)), _change(decided, i)) for i, pixels in enumerate(augmented)]
    tiles = []
    for sample, original, (half, change) in zip(ids, originals, halves, strict=True):
        height, width = split.reader.sizes[sample].tolist()
        tiles.append(Tile(sample, classes[split.reader.labels[sample]], height, width, original, half, change))
    return ContactSheet(split.name, tuple(tiles), note)


def _augmented(directory: Path, split: str, count: int, seed: int) -> tuple[np.ndarray, BatchPlan]:
    """Returns the first training batch as the model gets it, without normalisation, and its plan.

    The images are uint8 (count, size, size, 3). Raises `BackendMissingError` without PyTorch or torchvision.
    """
    try:
        import torch

        from sdpnet.pipelines.augment import DeviceStage
        from sdpnet.pipelines.loader import make_loader
    except (ImportError, OSError) as error:  # OSError: a shared library that PyTorch needs is missing
        raise BackendMissingError(f"PyTorch cannot be used here: {' '.join(str(error).split())}") from error
    data = DataOptions(
        path=str(directory),
        pipeline="torchvision",
        train_split=split,
        image_size=IMAGE_SIZE,
        batch_size_per_gpu=count,
        num_workers=1,
        crop=CROP,
    )
    augment = AugmentOptions(randaugment=RANDAUGMENT, erase=ERASE, mix=MIX if count > 1 else MixOptions())
    loader = make_loader(data, augment, "train", ShardOptions(), torch.device("cpu"), seed=seed)
    with closing(loader), closing(loader.batches()) as batches:
        batch = next(batches)
        stage = DeviceStage(augment, loader.manifest.num_classes, torch.float32, train=True)
        images = stage(batch)[0].permute(0, 2, 3, 1).numpy()
    pixels = (images * np.array(augment.std, np.float32) + np.array(augment.mean, np.float32)) * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), batch.plan


def _change(plan: BatchPlan, i: int) -> str:
    """A description of the augmentation of sample `i` of the plan."""
    height, width = plan.crop_boxes[i, 2:].tolist()
    words = [f"crop {width} × {height}"]
    if plan.flips[i]:
        words.append("flipped")
    draws = zip(plan.ops[i].tolist(), plan.magnitudes[i].tolist(), strict=True)
    words += [in_words(operation, m) for operation, m in draws if operation != Operation.IDENTITY]
    if plan.erase_boxes[i, 2]:
        words.append("erased")
    if plan.mix_kinds[i] != MIX_NONE:
        kind = "CutMix" if plan.mix_kinds[i] == MIX_CUTMIX else "MixUp"
        words.append(f"{kind}: {plan.mix_lambdas[i]:.0%} its own, rest {plan.sample_ids[plan.mix_partners[i]]}")
    return ", ".join(words)


def _original(directory: Path, split: SplitSurvey, sample: int) -> Image.Image:
    height, width = split.reader.sizes[sample].tolist()
    encoded = split.reader.encoded(sample)
    if split.reader.modes[sample] == MODE_RAW:
        return Image.fromarray(encoded.reshape(height, width, 3))
    try:
        return Image.fromarray(decode_jpeg(encoded, height, width))
    except DamagedJpegError as error:
        raise ShardError(f"{directory}: split {split.name!r}: sample {sample}: damaged JPEG ({error})") from None


def _jpeg(image: Image.Image) -> bytes:
    """A JPEG file of the image, reduced to at most `THUMBNAIL_SIDE` pixels a side."""
    file = BytesIO()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
