"""Command `sdpnet evaluate`: scores a model on a shard set, in one process or under torchrun."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.augment import DeviceStage
from pipelines.contract import PIPELINES, AugmentOptions, DataOptions, make_loader
from pipelines.errors import UserError, require
from sdpnet.checkpoint import load_model
from sdpnet.distributed import amp_dtype, join, leave
from sdpnet.evaluate import evaluate, write_per_class
from sdpnet.threads import use_threads

__all__ = ["add_arguments", "run"]


@dataclass(frozen=True)
class _Config:
    """What `make_loader` reads of a config, where there is no training."""

    data: DataOptions
    augment: AugmentOptions
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=Path, help="run directory, checkpoint or model.safetensors")
    weights = "averaged ones where there are any, or those of the last step (default: %(default)s)"
    add("--weights", choices=["ema", "raw"], default="ema", help=weights)
    add("--data", required=True, type=Path, help="shard set")
    add("--split", default="val", help="(default: %(default)s)")
    add("--pipeline", choices=["auto", *PIPELINES], default="auto", help="(default: %(default)s)")
    add("--batch-size", type=int, default=128, metavar="N", help="of each process (default: %(default)s)")
    add("--image-size", type=int, metavar="N", help="pixels a side (default: the model's, of its training)")
    add("--centre-fraction", type=float, metavar="X", help="of the shorter side, kept (default: the model's)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: %(default)s)")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="(default: %(default)s)")
    add("--per-class", type=Path, metavar="FILE", help="write each class's accuracy to a CSV file")


def run(arguments: argparse.Namespace) -> int:
    """Prints one JSON object: top1, top5, val_loss, num_samples, weights (ema or raw); in the main process only."""
    size, fraction, out = arguments.image_size, arguments.centre_fraction, arguments.per_class
    require(arguments.batch_size >= 1, "--batch-size", arguments.batch_size, "at least 1")
    require(fraction is None or 0 < fraction <= 1, "--centre-fraction", fraction, "in (0, 1]")
    if out is not None and not out.parent.is_dir():  # said now, not after the evaluation
        raise UserError(f"--per-class {out}: there is no directory {out.parent}; make it first")
    processes = join(arguments.device)
    try:
        if processes.device.type == "cpu" and (chosen := use_threads(processes.shard.local_world_size)).reduced:
            print(chosen, file=sys.stderr)
        model, card = load_model(arguments.model, arguments.weights)
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
        loader = make_loader(_Config(data, augment), "val", processes.shard, processes.device)
        if tuple(loader.manifest.classes) != card.classes:
            raise UserError(
                f"{arguments.data}: its {loader.manifest.num_classes} classes are not the {len(card.classes)} "
                "that the model was trained on"
            )
        dtype = amp_dtype(arguments.amp, processes.device)
        stage = DeviceStage(augment, card.model.num_classes, dtype, train=False)
        scores = evaluate(model, loader, stage, processes)
        assert scores is not None
        if processes.is_main:
            if out is not None:
                write_per_class(out, card.classes, scores.counts)
            print(json.dumps({**scores.as_dict(), "num_samples": scores.num_samples, "weights": card.weights}))
        return 0
    finally:
        leave()
