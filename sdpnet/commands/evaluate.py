"""Command `sdpnet evaluate`: scores a model on a shard set, in one process or under torchrun."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sdpnet.checkpoints.class_names import first_difference
from sdpnet.checkpoints.model import ModelCard, load_model
from sdpnet.checkpoints.model_card import card_text
from sdpnet.distributed.processes import join_group, leave_group
from sdpnet.execution.hardware import amp_dtype
from sdpnet.execution.threads import use_threads
from sdpnet.flags.evaluate import add_arguments
from sdpnet.loading.image_loader import ImageLoader
from sdpnet.model.sdpnet import SdPNet
from sdpnet.pipelines.errors import UserError, printable, require
from sdpnet.pipelines.files.atomic_write import require_place
from sdpnet.pipelines.images.preprocessing import Preprocessing
from sdpnet.pipelines.options import AugmentOptions, DataOptions
from sdpnet.pipelines.terminal.next_step import next_lines
from sdpnet.pipelines.terminal.readable_names import readable_names
from sdpnet.reporting.finished_run import export_command
from sdpnet.reporting.output import say, say_json
from sdpnet.training.evaluate import Scores, evaluate, write_per_class
from sdpnet.training.same_start import code_facts, require_same_start, shard_facts

__all__ = ["add_arguments", "run", "table"]

_LOWEST = 5  # the number of classes with the lowest top-1 in the table


def run(arguments: argparse.Namespace) -> int:
    """Prints the scores in the main process: a table, or with `--json` one JSON object.

    The object has the keys top1, top5, val_loss, num_samples and weights (ema or raw).
    """
    size, fraction, out = arguments.image_size, arguments.centre_fraction, arguments.per_class
    require(arguments.batch_size >= 1, "--batch-size", arguments.batch_size, "at least 1")
    require(fraction is None or 0 < fraction <= 1, "--centre-fraction", fraction, "in (0, 1]")
    if out is not None:
        require_place(out, "--per-class")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no usable GPU here; take --device cpu or auto")
    processes = join_group(arguments.device)
    try:
        if processes.device.type == "cpu" and (chosen := use_threads(processes.shard.local_world_size)).reduced:
            print(chosen, file=sys.stderr)
        model, card = load_model(arguments.model, arguments.weights)
        require_same_start(lambda: _facts(arguments, model, card), processes)
        patch = card.model.patch_size
        require(size is None or (size >= patch and size % patch == 0), "--image-size", size, f"a multiple of {patch}")
        model = model.to(processes.device).to(memory_format=torch.channels_last)
        data = DataOptions(
            path=str(arguments.data),
            pipeline=arguments.pipeline,
            val_split=arguments.split,
            image_size=size or card.image_size,
            batch_size_per_gpu=arguments.batch_size,
            centre_fraction=fraction or card.centre_fraction,
        )
        augment = AugmentOptions(mean=card.mean, std=card.std)
        dtype = amp_dtype(arguments.amp, processes.device)
        loader = ImageLoader.from_options(
            data,
            augment,
            "val",
            processes.shard,
            processes.device,
            seed=0,
            dtype=dtype,
            num_classes=card.model.num_classes,
        )
        if (difference := first_difference(card.classes, loader.manifest.classes)) is not None:
            raise UserError(
                f"{arguments.model}: was trained on other classes than those of {arguments.data}: {difference}"
            )
        if processes.is_main:
            _warn(arguments.data, Preprocessing.of(loader.manifest.encode), card.preprocessing)
        scores = evaluate(model, loader, loader.stage, processes)
        assert scores is not None
        if processes.is_main:
            names = () if out is None else readable_names(card.classes)
            if arguments.json:
                say_json({**scores.as_dict(), "num_samples": scores.num_samples, "weights": card.weights})
            else:
                say(*table(scores, card.weights, names))
            if out is not None:  # after the output: if the file cannot be written, the scores are not lost
                write_per_class(out, card.classes, scores.counts)
            if not arguments.json:
                say(*next_lines(*export_command(arguments.model)))
        return 0
    finally:
        leave_group()


def _facts(arguments: argparse.Namespace, model: SdPNet, card: ModelCard) -> dict[str, str]:
    """The facts that must be equal in all processes. Paths are not included: they may differ."""
    names = ("split", "pipeline", "batch_size", "image_size", "centre_fraction", "amp")
    flags = {f"--{name.replace('_', '-')}": str(getattr(arguments, name)) for name in names}
    digest = hashlib.sha256(card_text(card).encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    shards = shard_facts(arguments.data, [arguments.split])
    return {**flags, "the model (SHA-256)": digest.hexdigest(), **code_facts(), **shards}


def table(scores: Scores, weights: str, names: Sequence[str] = ()) -> list[str]:
    """The lines of the table. With the names of the classes, it includes the classes with the lowest top-1."""
    rows = [
        ("images", f"{scores.num_samples:,}"),
        ("top-1", f"{scores.top1:.2%}"),
        ("top-5", f"{scores.top5:.2%}"),
        ("loss", f"{scores.loss:.4f}"),
        ("weights", {"ema": "averaged", "raw": "of the last step"}[weights]),
    ]
    lines = [f"{name:8} {text}" for name, text in rows]
    if not names:
        return lines
    samples, top1 = scores.counts[: len(names), 0], scores.counts[: len(names), 1]
    scored = np.flatnonzero(samples)
    lowest = scored[np.argsort(top1[scored] / samples[scored], kind="stable")][:_LOWEST]
    lines.append(f"classes with the lowest top-1, of {len(scored):,}:")
    return lines + [f"{top1[i] / samples[i]:8.2%} of {samples[i]:,}  {names[i]}" for i in lowest.tolist()]


def _warn(data: Path, theirs: Preprocessing, ours: Preprocessing) -> None:
    """Warns on stderr if the EXIF orientation was treated differently in the images that the model was trained on."""
    if theirs.exif != ours.exif:
        print(
            f"{printable(data)}: was made with --exif {theirs.exif}, and the model was trained on images made with "
            f"--exif {ours.exif}: photographs that were taken with a turned camera will score lower",
            file=sys.stderr,
        )
