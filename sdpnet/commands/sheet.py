"""The contact sheet of a training batch: the images as the model gets them, each with its draws written under it.

config --ImageLoader--> Batch --its stage--> images --undo the normalisation--> PNG
                          '--plan--> describe
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from sdpnet.config.load import load_config
from sdpnet.config.options import Config
from sdpnet.config.setting import text_setting
from sdpnet.flags.sheet import SHOWN, add_arguments
from sdpnet.loading.image_loader import ImageLoader
from sdpnet.pipelines.errors import require
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.options import ShardOptions
from sdpnet.pipelines.plan import MIX_CUTMIX, MIX_NONE, BatchPlan
from sdpnet.pipelines.planning.policies import in_words
from sdpnet.pipelines.terminal.next_step import next_lines, training
from sdpnet.pipelines.terminal.readable_names import readable_names
from sdpnet.reporting.output import say

__all__ = ["add_arguments", "augmented_batch", "describe", "draw", "run"]

CELL_WIDTH: Final = 240  # the minimum in pixels; smaller images are enlarged by an integer factor
MARGIN: Final = 10
FONT_SIZE: Final = 12
LINE_HEIGHT: Final = 15
INK: Final = (0, 0, 0)
FAINT: Final = (85, 85, 85)


def describe(plan: BatchPlan, i: int, sizes: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The decisions of the plan for one sample, one line each, in the order in which they are applied.

    The first line is the target: the class, or both classes of a mixed sample with their weights before label
    smoothing. Boxes of erasing and CutMix are in output pixels, from the left (x) and the top (y).

    Args:
        plan: the plan of a batch of B samples.
        i: the index of the sample in the batch.
        sizes: int (B, 2), height and width of the stored images. Crop boxes are given as fractions of them.
        classes: the name of the class of each of the B samples.
    """
    own, partner = plan.mix_lambdas[i], plan.mix_partners[i]
    mixed = plan.mix_kinds[i] != MIX_NONE
    target = f"{classes[i]} {own:.0%} + {classes[partner]} {1 - own:.0%}" if mixed else classes[i]
    lines = [f"#{plan.sample_ids[i]} {target}"]
    if not plan.valid[i]:
        lines.append("not decoded, not trained on")
    height, width = sizes[i].tolist()
    top, left, crop_height, crop_width = plan.crop_boxes[i].tolist()
    across = f"{100 * left / width:.0f}-{(left + crop_width) / width:.0%}"
    down = f"{100 * top / height:.0f}-{(top + crop_height) / height:.0%}"
    share = crop_height * crop_width / (height * width)
    lines.append(f"crop x {across}, y {down}: {share:.0%} of {width}x{height}")
    if plan.flips[i]:
        lines.append("flip")
    for operation, m in zip(plan.ops[i].tolist(), plan.magnitudes[i].tolist(), strict=True):
        lines.append(in_words(operation, m))
    if plan.erase_boxes[i, 2]:
        lines.append(f"erase {_box(plan.erase_boxes[i])}")
    if mixed:
        cut = plan.mix_kinds[i] == MIX_CUTMIX
        lines.append(f"{'CutMix' if cut else 'MixUp'} with #{plan.sample_ids[partner]}, lambda {own:.2f}")
        if cut:
            lines.append(f"its {_box(plan.mix_boxes[i])}")
    return lines


def _box(box: np.ndarray) -> str:
    top, left, height, width = box.tolist()
    return f"{width}x{height} px at x {left}, y {top}"


def augmented_batch(config: Config, epoch: int, index: int) -> tuple[np.ndarray, list[list[str]]]:
    """A training batch of one process, decoded and augmented on the CPU.

    Args:
        epoch: the epoch, from 0.
        index: the batch in the epoch, from 0.

    Returns:
        The images with their normalisation undone, uint8 (B, image_size, image_size, 3), rounded and clipped to 0 to
        255, and the lines of `describe` for each.

    Raises:
        UserError: there is no such batch, or `ImageLoader` raises it.
    """
    require(epoch >= 0, "--epoch", epoch, "0 or more")
    data, augment, cpu = config.data, config.augment, torch.device("cpu")
    with ImageLoader.from_options(data, augment, "train", ShardOptions(), cpu, seed=config.seed) as loader:
        require(0 <= index < len(loader), "--batch", index, f"0 to {len(loader) - 1}, the last of an epoch")
        names = readable_names(loader.manifest.classes)
        with closing(loader.batches(epoch, index)) as batches:
            batch = next(batches)
            images = loader.stage.images(batch).permute(0, 2, 3, 1).numpy()
            sizes = loader.source.reader.sizes[batch.plan.sample_ids]
            classes = [names[label] for label in batch.labels.tolist()]
            lines = [describe(batch.plan, i, sizes, classes) for i in range(len(batch.plan))]
    mean, std = np.array(config.augment.mean, np.float32), np.array(config.augment.std, np.float32)
    return np.clip(np.rint((images * std + mean) * 255), 0, 255).astype(np.uint8), lines


def draw(heading: str, images: np.ndarray, lines: Sequence[Sequence[str]]) -> Image.Image:
    """Draws images, uint8 (N, S, S, 3), in rows below a heading, with the lines of text of each image below it.

    A row has at least four cells, or so many that the sheet is about square. Their number is even, so that two samples
    that are mixed with each other are side by side. Images that are smaller than `CELL_WIDTH` are enlarged by an
    integer factor without interpolation.
    """
    count, side = images.shape[:2]
    columns = min(count, max(4, 2 * round(count**0.5 / 2)))
    scale = max(1, CELL_WIDTH // side)
    cell = max(CELL_WIDTH, scale * side)
    total = columns * (cell + MARGIN) + MARGIN
    font = ImageFont.load_default(FONT_SIZE)
    above = _wrapped(heading, total - 2 * MARGIN, font)
    texts = [[_wrapped(line, cell, font) for line in image_lines] for image_lines in lines]
    heights = [sum(map(len, text)) * LINE_HEIGHT for text in texts]
    rows = [max(heights[start : start + columns]) for start in range(0, count, columns)]
    top = 2 * MARGIN + len(above) * LINE_HEIGHT
    sheet = Image.new("RGB", (total, top + sum(rows) + len(rows) * (scale * side + 2 * MARGIN)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, MARGIN), above, INK, font)
    for row, text_height in enumerate(rows):
        for column, i in enumerate(range(row * columns, min(count, (row + 1) * columns))):
            left = MARGIN + column * (cell + MARGIN)
            picture = Image.fromarray(images[i])
            sheet.paste(picture.resize((scale * side, scale * side), Image.Resampling.NEAREST), (left, top))
            y = top + scale * side + MARGIN // 2
            for number, part in enumerate(texts[i]):
                y = _write(pen, (left, y), part, FAINT if number else INK, font)
        top += scale * side + text_height + 2 * MARGIN
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Splits a text into lines of at most `width` pixels, at spaces if possible.

    Characters outside of ASCII are escaped, because the font does not have them.
    """
    lines, line = [], ""
    for word in ascii(text)[1:-1].split(" "):
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        line = longer
        while font.getlength(line) > width:
            fits = next(n for n in range(len(line) - 1, 0, -1) if font.getlength(line[:n]) <= width)
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line]


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    lines: list[str],
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> int:
    """Writes lines from `at` (x, y) downwards. Returns y for the next line."""
    x, y = at
    for line in lines:
        pen.text((x, y), line, fill=colour, font=font)
        y += LINE_HEIGHT
    return y


def run(arguments: argparse.Namespace) -> int:
    settings = list(arguments.set)
    settings += [text_setting("data.path", arguments.data)] if arguments.data else []
    settings += [f"data.pipeline={arguments.pipeline}"] if arguments.pipeline else []
    config = load_config(arguments.config, settings)
    batch_size, out = config.data.batch_size_per_gpu, arguments.out
    count = min(SHOWN, batch_size) if arguments.count is None else arguments.count
    require(1 <= count <= batch_size, "--count", count, f"1 to data.batch_size_per_gpu ({batch_size})")
    require(out.suffix.lower() == ".png", "--out", str(out), "the name of a .png file")
    images, lines = augmented_batch(config, arguments.epoch, arguments.batch)
    augment, mix = config.augment, config.augment.mix
    heading = (
        f"{arguments.config}: {count} of the {batch_size} images of batch {arguments.batch}, epoch {arguments.epoch}, "
        f"seed {config.seed}; {config.data.image_size} px, policy {augment.randaugment.policy}, "
        f"erasing {augment.erase.probability:.0%} ({augment.erase.mode}), mixing {mix.probability * mix.enabled:.0%} "
        f"(MixUp {mix.mixup_alpha}, CutMix {mix.cutmix_alpha}), label smoothing {augment.label_smoothing}"
    )
    file = BytesIO()
    draw(heading, images[:count], lines[:count]).save(file, "PNG")
    publish_bytes(out, file.getvalue())
    say(str(out))
    flags = ["--pipeline", arguments.pipeline] if arguments.pipeline else []
    flags += [word for setting_ in arguments.set for word in ("--set", setting_)]
    say(*next_lines(*training(Path(config.data.path), arguments.config, *flags)))
    return 0
