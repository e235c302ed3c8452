"""The flags of `sdpnet export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal, get_args

from sdpnet.pipelines.terminal.quiet import add_quiet

__all__ = ["Batch", "Format", "add_arguments"]

Format = Literal["onnx", "torch-export"]
Batch = int | Literal["dynamic"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--model", required=True, type=Path, help="run directory or model.safetensors")
    parser.add_argument("--format", required=True, choices=get_args(Format))
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: that of the training)")
    parser.add_argument("--batch", type=_batch, default="dynamic", help="a fixed batch size (default: any size)")
    add_quiet(parser)


def _batch(text: str) -> Batch:
    try:
        return "dynamic" if text == "dynamic" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be dynamic or a number of images, not {text!r}") from None
