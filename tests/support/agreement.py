"""Compares the pipelines with the reference on a real shard set, for one plan.

    python tests/support/agreement.py --data SHARDS

Prints, for each pipeline and split, whether sample ids and labels are identical, and the mean absolute difference of
the pixels to the torchvision reference (in levels of 255, over all images and for the worst image). The exit status is
1 if ids or labels differ, or the mean difference is above the limit that the tests use.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch
from pipeline_batches import loader_for
from rich.console import Console
from rich.table import Table

from sdpnet.config.load import load_config

LIMITS = {"native": 1.0, "dali": 0.5, "ffcv": 4.0}  # mean absolute difference, levels of 255
ON_GPU = {"dali": 2.0}  # nvJPEG decodes there, with arithmetic of its own; not measured yet
SETTINGS = ["data.image_size=224", "data.num_workers=0"]
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


@dataclass(frozen=True)
class Agreement:
    pipeline: str
    split: str
    num_images: int
    same_ids: bool
    same_labels: bool
    mean_difference: float
    worst_image: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.same_ids and self.same_labels and self.mean_difference <= self.limit


def compare(
    data: str, pipeline: str, split: Literal["train", "val"], device: torch.device, num_batches: int | None, size: int
) -> Agreement:
    """Compares all batches of a split, or the first ones. The reference decodes on the CPU."""
    loaders = []
    for name, where in (("torchvision", torch.device("cpu")), (pipeline, device)):
        settings = [f"data.path={data}", f"data.pipeline={name}", *SETTINGS, f"data.batch_size_per_gpu={size}"]
        loaders.append(loader_for(load_config("debug", settings), split, device=where))
    same_ids = same_labels = True
    differences = []
    with closing(loaders[0].batches(epoch=1)) as references, closing(loaders[1].batches(epoch=1)) as others:
        # strict: both have as many batches; islice ends both after the same number
        for reference, ours in zip(islice(references, num_batches), islice(others, num_batches), strict=True):
            same_ids &= torch.equal(reference.sample_ids, ours.sample_ids.cpu())
            same_labels &= torch.equal(reference.labels, ours.labels.cpu())
            difference = (reference.images.int() - ours.images.cpu().int()).abs().float().mean((1, 2, 3))
            differences.append(difference[reference.valid])
    for loader in loaders:
        loader.close()
    each = torch.cat(differences)
    limit = {**LIMITS, **(ON_GPU if device.type == "cuda" else {})}[pipeline]
    return Agreement(pipeline, split, len(each), same_ids, same_labels, each.mean().item(), each.max().item(), limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="shard set with the splits train and val")
    parser.add_argument("--pipelines", default=",".join(LIMITS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--batches", type=int, metavar="N", help="of each split (default: all)")
    parser.add_argument("--batch-size", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    how = (torch.device(arguments.device), arguments.batches, arguments.batch_size)
    names = arguments.pipelines.split(",")
    results = [compare(arguments.data, name, split, *how) for name in names for split in SPLITS]
    table = Table("pipeline", "split", "images", "ids", "labels", "mean", "limit", "worst image")
    for r in results:
        same = ["same" if same else "OTHER" for same in (r.same_ids, r.same_labels)]
        figures = [f"{r.mean_difference:.3f}", f"{r.limit}", f"{r.worst_image:.3f}"]
        table.add_row(r.pipeline, r.split, str(r.num_images), *same, *figures)
    Console().print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(r) for r in results], file, indent=1)
    return 0 if all(r.holds for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
