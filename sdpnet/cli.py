"""The `sdpnet` command: train, evaluate, predict, export, sheet, doctor; and programs of the other packages."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from pipelines.augment import DeviceStage
from pipelines.contract import PIPELINES, AugmentOptions, DataOptions, make_loader
from pipelines.errors import UserError, run_command
from sdpnet import __version__, doctor, export, sheet, train
from sdpnet.checkpoint import load_model
from sdpnet.distributed import amp_dtype, join, leave
from sdpnet.evaluate import evaluate
from sdpnet.predict import predict

__all__ = ["main"]

# name -> (module that is run, what it does): their flags are their own, and this package imports nothing of preprocess.
PROGRAMS: Final = {
    "inspect": ("preprocess.report", "show what is in a shard set"),
    "verify": ("preprocess.verify", "check a shard set from end to end"),
    "bench": ("pipelines.bench", "time the pipelines on a shard set"),
}


def _evaluate(arguments: argparse.Namespace) -> int:
    processes = join(arguments.device)
    try:
        model, card = load_model(arguments.model)
        model = model.to(processes.device).to(memory_format=torch.channels_last)
        data = DataOptions(
            path=str(arguments.data),
            pipeline=arguments.pipeline,
            val_split=arguments.split,
            image_size=arguments.image_size or card.image_size,
            batch_size_per_gpu=arguments.batch_size,
            centre_fraction=card.centre_fraction,
        )
        augment = AugmentOptions(mean=card.mean, std=card.std)
        loader = make_loader(_EvaluationConfig(data, augment), "val", processes.shard, processes.device)
        if tuple(loader.manifest.classes) != card.classes:
            raise UserError(
                f"{arguments.data}: its {loader.manifest.num_classes} classes are not the {len(card.classes)} "
                "that the model was trained on"
            )
        dtype = amp_dtype("auto", processes.device)
        stage = DeviceStage(augment, card.model.num_classes, dtype, train=False)
        scores = evaluate(model, loader, stage, processes)
        assert scores is not None
        if processes.is_main:
            print(json.dumps({**scores.as_dict(), "num_samples": scores.num_samples}))
        return 0
    finally:
        leave()


class _EvaluationConfig:
    """What `make_loader` reads of a config, where there is no training."""

    seed = 0

    def __init__(self, data: DataOptions, augment: AugmentOptions) -> None:
        self.data = data
        self.augment = augment


def _predict(arguments: argparse.Namespace) -> int:
    model, card = load_model(arguments.model)
    console = Console(highlight=False)
    for path, predictions in zip(arguments.images, predict(model, card, arguments.images), strict=True):
        console.print(f"{path}", markup=False)
        for prediction in predictions:
            console.print(f"  {prediction.probability:7.2%}  {prediction.name}", markup=False)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status. One of `PROGRAMS` ends with `SystemExit`, as it does by itself."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PROGRAMS:
        sys.argv = [f"sdpnet {argv[0]}", *argv[1:]]
        runpy.run_module(PROGRAMS[argv[0]][0], run_name="__main__")
        return 0
    parser = argparse.ArgumentParser(prog="sdpnet", description="Trains SdP-Net fast, from shards of images.")
    parser.add_argument("--version", action="version", version=f"sdpnet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train a model", description=train.__doc__)
    train.add_arguments(command)
    command.set_defaults(run=train.run)

    command = commands.add_parser("evaluate", help="score a finished model on a shard set")
    command.add_argument("--model", required=True, type=Path, help="run directory or model.safetensors")
    command.add_argument("--data", required=True, type=Path, help="shard set")
    command.add_argument("--split", default="val")
    command.add_argument("--pipeline", choices=["auto", *PIPELINES], default="auto")
    command.add_argument("--batch-size", type=int, default=128)
    command.add_argument("--image-size", type=int, help="pixels a side; the training size by default")
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("predict", help="name what is in some images")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_argument("--model", required=True, type=Path, help="run directory or model.safetensors")
    command.set_defaults(run=_predict)

    command = commands.add_parser("export", help="write a finished model as ONNX or as an exported PyTorch program")
    export.add_arguments(command)
    command.set_defaults(run=export.run)

    command = commands.add_parser("sheet", help="draw a training batch as the model gets it")
    sheet.add_arguments(command)
    command.set_defaults(run=sheet.run)

    command = commands.add_parser("doctor", help="what is installed, and what limits training on this machine")
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.run)

    for name, (_, purpose) in PROGRAMS.items():  # for `sdpnet --help`
        commands.add_parser(name, help=purpose)

    arguments = parser.parse_args(argv)
    return run_command(lambda: arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
