"""The `sdpnet` command: train, evaluate, predict, report, export, sheet, doctor; programs of the other packages."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Final

from rich.console import Console

from pipelines.errors import run_command
from sdpnet import __version__, bench_step, doctor, evaluate_command, export, run_report, sheet, train
from sdpnet.checkpoint import load_model
from sdpnet.predict import predict

__all__ = ["main"]

# name -> (module that is run, what it does): their flags are their own, and this package imports nothing of preprocess.
PROGRAMS: Final = {
    "inspect": ("preprocess.report", "show what is in a shard set"),
    "verify": ("preprocess.verify", "check a shard set from end to end"),
    "bench": ("pipelines.bench", "time the pipelines; bench step: the training step"),
}


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
    if argv[:2] == ["bench", "step"]:
        return bench_step.main(argv[2:])
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

    command = commands.add_parser("evaluate", help="score a model on a shard set")
    evaluate_command.add_arguments(command)
    command.set_defaults(run=evaluate_command.run)

    command = commands.add_parser("predict", help="name what is in some images")
    command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    command.add_argument("--model", required=True, type=Path, help="run directory or model.safetensors")
    command.set_defaults(run=_predict)

    command = commands.add_parser("report", help="draw the curves of one or more runs, and compare them")
    run_report.add_arguments(command)
    command.set_defaults(run=run_report.run)

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
