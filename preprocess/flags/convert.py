"""The flags of `sdpnet convert`."""

from __future__ import annotations

import argparse

from sdpnet.preprocess.flags import conversion

__all__ = ["FORMATS", "add_arguments"]

FORMATS = ("beton", "tar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    conversion.add_arguments(parser)
    format = "beton: one FFCV file for each split; tar: WebDataset tars with DALI's index (default: %(default)s)"
    parser.add_argument("--format", choices=FORMATS, default="beton", help=format)
    shard = "largest size of a tar in MiB (default: 1024)"
    parser.add_argument("--shard-mib", metavar="N", type=int, help=shard)
