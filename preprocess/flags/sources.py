"""The flags that say which images to convert or to adopt."""

from __future__ import annotations

import argparse

__all__ = ["add_source_arguments"]


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which images to convert."""
    add = parser.add_argument
    source = (
        "holds train/CLASS/*.jpg and val/CLASS/*.jpg, or ImageNet's tars, or CLASS/*.jpg, or train-*.parquet (Hugging "
        "Face) or train-*.tar (WebDataset)"
    )
    add("--source", metavar="PATH", help=source)
    add("--train", metavar="PATH", help="folder or file of the train split, instead of what SOURCE has")
    add("--val", metavar="PATH", help="folder or file of the val split, instead of what SOURCE has (val/ or valid/)")
    labels = "labels of val images without class folders: FILE LABEL lines, CSV, ImageNet's ground truth or devkit"
    add("--val-labels", metavar="FILE", help=labels)
    add("--synsets", metavar="FILE", help="the classes of ImageNet's IDs: meta.mat, map_clsloc.txt or a similar file")
    share = "without val images: draw this share of each class's train images as the val split, such as 0.05"
    add("--val-share", metavar="SHARE", type=float, help=share)
    add("--val-seed", metavar="N", type=int, help="seed of that draw (default: 0)")
    add("--image-column", metavar="NAME", help="the column of Parquet files with the images, if several may be meant")
    add("--label-column", metavar="NAME", help="the column of Parquet files with the labels, if several may be meant")
