"""Compares the fused augmentation kernels with their reference, on real batches: every operation, pairs, policies.

    python -m sdpnet.gpu_checks.programs.fused --data SHARDS --json FILE

The same uint8 batch and plan go through the fused kernels on the GPU, through the PyTorch reference on the GPU, and
through the reference on the CPU. Differences are given in levels of 255. The exit status is 1 if the fused kernels
differ from either reference by more than rounding: in float32 by `LIMIT` levels, in bfloat16 by one unit in the last
place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from sdpnet.config.load import load_config
from sdpnet.config.setting import text_setting
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.augment.fused import launch as fused
from sdpnet.pipelines.contract import Batch
from sdpnet.pipelines.files.atomic_write import publish_bytes
from sdpnet.pipelines.loader import make_loader
from sdpnet.pipelines.options import AugmentOptions, ShardOptions
from sdpnet.pipelines.plan import EraseOptions, MixOptions, Plan
from sdpnet.pipelines.planning.policies import Operation, RandAugmentOptions
from sdpnet.pipelines.terminal.command_line import run_alone

__all__ = ["add_arguments", "cases", "compare", "main", "run"]

LIMIT: Final = 1e-3  # levels: the noise of erased boxes has a logarithm and a cosine, which differ in their last bits
FILLS: Final = ((0.0, 0.0, 0.0), (124.0, 116.0, 104.0))
# operation -> (lowest, highest) magnitude. Those that are not listed have none.
RANGES: Final[dict[Operation, tuple[float, float]]] = {
    Operation.SHEAR_X: (-0.3, 0.3),
    Operation.SHEAR_Y: (-0.3, 0.3),
    Operation.TRANSLATE_X: (-100, 100),
    Operation.TRANSLATE_Y: (-100, 100),
    Operation.ROTATE: (-30, 30),
    Operation.BRIGHTNESS: (-0.9, 0.9),
    Operation.COLOUR: (-0.9, 0.9),
    Operation.CONTRAST: (-0.9, 0.9),
    Operation.SHARPNESS: (-0.9, 0.9),
    Operation.POSTERIZE: (0, 8),
    Operation.SOLARIZE: (0, 256),
    Operation.SOLARIZE_ADD: (0, 128),
    Operation.GAUSSIAN_BLUR: (0.4, 2.0),
}
WHOLE: Final = (Operation.POSTERIZE, Operation.SOLARIZE_ADD)


@dataclass(frozen=True)
class Case:
    """One comparison. `operations` are the kinds for all samples, uint8 (B, K), or None if the policy draws them."""

    name: str
    options: AugmentOptions
    operations: np.ndarray | None = None
    dtype: torch.dtype = torch.float32


def cases(batch_size: int) -> Iterator[Case]:
    """Each operation alone, the policies with erasing and mixing, and then all ordered pairs of operations."""
    geometric = range(Operation.SHEAR_X, Operation.ROTATE + 1)
    for how, fill, operation in itertools.product(("nearest", "bilinear"), FILLS, Operation):
        if operation in geometric or (how == "nearest" and not any(fill)):
            rand = RandAugmentOptions("randaugment", num_ops=1, interpolation=how, fill=fill)  # type: ignore[arg-type]
            name = f"{operation.name.lower()} {how}{' filled' if any(fill) else ''}"
            yield Case(name, AugmentOptions(randaugment=rand), np.full((batch_size, 1), operation, np.uint8))
    for policy, how, dtype in itertools.product(
        ("randaugment", "increasing", "three"), ("nearest", "bilinear"), (torch.float32, torch.bfloat16)
    ):
        rand = RandAugmentOptions(policy, interpolation=how)  # type: ignore[arg-type]
        options = AugmentOptions(randaugment=rand, erase=EraseOptions(0.5, mode="pixel"), mix=MixOptions(0.8, 1.0))
        yield Case(f"{policy} {how}, erasing, mixing, {str(dtype).removeprefix('torch.')}", options, None, dtype)
    pairs = np.array(list(itertools.product(list(Operation), repeat=2)), np.uint8)
    for how, start in itertools.product(("nearest", "bilinear"), range(0, len(pairs), batch_size)):
        rand = RandAugmentOptions("randaugment", num_ops=2, interpolation=how)  # type: ignore[arg-type]
        some = np.resize(pairs[start : start + batch_size], (batch_size, 2))
        yield Case(f"pairs from {start} {how}", AugmentOptions(randaugment=rand), some)


def _magnitudes(operations: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Magnitudes over the range of each operation, some at its ends and at whole and half numbers, where ties fall."""
    out = np.zeros(operations.shape, np.float32)
    for index in np.ndindex(operations.shape):
        kind = Operation(int(operations[index]))
        low, high = RANGES.get(kind, (0.0, 0.0))
        value = generator.uniform(low, high)
        if generator.random() < 0.15:
            value = min(high, max(low, generator.choice([low, high, round(value), round(2 * value) / 2])))
        out[index] = round(value) if kind in WHOLE else value
    return out


def compare(case: Case, batch: Batch, generator: np.random.Generator) -> dict[str, Any]:
    """The result of a case.

    Args:
        batch: uint8 images on the device.

    Returns:
        `name`; `same`, whether all bits are the same; `largest`, the largest difference in levels; `within`, whether it
        is rounding.
    """
    count, size = len(batch.images), batch.images.shape[1]
    options = case.options
    plan = Plan(
        seed=7,
        sizes=np.full((count, 2), 300, np.int32),
        batch_size=count,
        image_size=size,
        randaugment=options.randaugment,
        erase=options.erase,
        mix=options.mix,
    ).batch(0, 0)
    if case.operations is not None:
        plan = replace(plan, ops=case.operations, magnitudes=_magnitudes(case.operations, generator))
    batch = replace(batch, plan=plan)
    on_cpu = Batch(batch.images.cpu(), batch.labels.cpu(), batch.sample_ids.cpu(), batch.valid.cpu(), plan)
    num_classes = int(batch.labels.max()) + 1

    def staged(how: str, source: Batch) -> torch.Tensor:
        stage = DeviceStage(replace(options, fused=how), num_classes, case.dtype, train=True)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "augment.fused")  # kernels that fail to compile must not be passed over
            return stage(source)[0].cpu()

    ours = staged("auto", batch)
    same, within, largest = True, True, 0.0
    for reference in (staged("off", batch), staged("off", on_cpu)):
        difference = (ours.float() - reference.float()).abs()
        levels = difference * 255 * torch.tensor(options.std).view(1, 3, 1, 1)
        same &= torch.equal(ours, reference)
        largest = max(largest, levels.max().item())
        allowed = levels <= LIMIT
        if case.dtype == torch.bfloat16:
            allowed |= difference <= reference.float().abs() * 2**-7
        within &= bool(allowed.all()) and bool(torch.isfinite(ours).all())
    return {"name": case.name, "same": same, "within": within, "largest": largest}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="SHARDS", help="shard set")
    add("--batch-size", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--image-size", type=int, default=224, metavar="N", help="default: %(default)s")
    add(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="no further case begins after it (default: %(default)s)",
    )
    add("--device", choices=["cpu", "cuda"], default="cuda", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="also write the results to this file")


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each case. Returns 1 if one is not within rounding."""
    began, device = time.perf_counter(), torch.device(arguments.device)
    size = [f"data.image_size={arguments.image_size}", f"data.batch_size_per_gpu={arguments.batch_size}"]
    config = load_config("sdpnet_xl", [*size, text_setting("data.path", arguments.data)])
    loader = make_loader(config.data, config.augment, "train", ShardOptions(), device, seed=config.seed)
    with closing(loader), closing(loader.batches()) as batches:
        batch = next(batches)
        batch = replace(batch, images=batch.images.clone())
    run_here = fused.runs_on(device)
    print(f"{len(batch.images)} images of {arguments.image_size} px on {device}", flush=True)
    if not run_here:
        print("the fused kernels do not run here: the reference is compared with itself")
    generator, rows, left_out = np.random.default_rng(0), [], 0
    for case in cases(arguments.batch_size):
        if time.perf_counter() - began > arguments.seconds:
            left_out += 1
            continue
        rows.append(row := compare(case, batch, generator))
        verdict = "the same bits" if row["same"] else f"at most {row['largest']:.3g} levels"
        print(f"{row['name']}: {verdict}{'' if row['within'] else ': MORE THAN ROUNDING'}", flush=True)
    result = {
        "device": str(device),
        "fused_kernels": run_here,
        "cases": len(rows),
        "left_out": left_out,
        "same_to_the_bit": sum(row["same"] for row in rows),
        "largest_levels": max((row["largest"] for row in rows), default=None),
        "wrong": [row["name"] for row in rows if not row["within"]],
        "results": rows,
    }
    if arguments.json is not None:
        publish_bytes(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    return 1 if result["wrong"] or not rows else 0


def main(argv: list[str] | None = None) -> int:
    return run_alone("fused", (__doc__ or "").splitlines()[0], add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
