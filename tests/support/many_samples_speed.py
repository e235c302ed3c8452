"""Times the first batch of `ImageLoader` from a set of very many samples, with weights and without.

    python tests/support/many_samples_speed.py --set SET_IN_PLACE_OF_TARS [--samples 14000000] [--json RECORD]

The set is an index with its samples repeated, so that it needs no more images than there are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sdpnet import ImageLoader
from sdpnet.pipelines.machine import commit, cpu_name, usable_cores
from sdpnet.pipelines.shards.file import MappedFile
from sdpnet.pipelines.shards.index_file import HEADER_DTYPE, Index
from sdpnet.pipelines.shards.manifest import read_manifest


def repeated(source: Path, out: Path, num_samples: int) -> None:
    """Writes a set with the containers of `source` and its training samples repeated, `num_samples` in all."""
    index = Index(MappedFile(source / "train.index"))
    content = (source / "train.index").read_bytes()
    header = np.frombuffer(content[: HEADER_DTYPE.itemsize], HEADER_DTYPE).copy()
    assert header["flags"][0] == 0, "without checksums"
    before = HEADER_DTYPE.itemsize + 8 * int(header["num_folders"][0]) + index.containers.nbytes
    names = content[before + index.samples.nbytes :]
    header["num_samples"] = num_samples
    samples = np.resize(index.samples, num_samples)
    with (out / "train.index").open("wb") as file:
        file.write(header.tobytes() + content[HEADER_DTYPE.itemsize : before])
        samples.tofile(file)
        file.write(names)
    manifest = read_manifest(source)
    split = manifest.splits["train"]
    shard = replace(split.files[0], num_samples=num_samples, bytes=(out / "train.index").stat().st_size)
    splits = {"train": replace(split, num_samples=num_samples, num_kept=num_samples, files=(shard,))}
    (out / "manifest.json").write_text(replace(manifest, splits=splits, quarantine_sha256=None).to_json())


def first_batch(data: Path, **options: Any) -> tuple[float, float]:
    """Seconds from nothing to an open loader, and from there to its first batch."""
    began = time.perf_counter()
    with ImageLoader(data, batch_size=256, device="cpu", **options) as loader:
        opened = time.perf_counter()
        next(iter(loader))
        return opened - began, time.perf_counter() - opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, required=True, help="set in place, of tars, without checksums")
    parser.add_argument("--samples", type=int, default=14_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    weights = np.random.default_rng(0).exponential(size=arguments.samples)
    contestants: dict[str, dict[str, Any]] = {
        "every sample once": {},
        "weights": {"weights": weights},
        "balanced": {"weights": "balanced"},
        "subset of 10 %": {"subset": 0.1},
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory(dir=arguments.set.parent) as folder:
        # Paths of containers are relative to the set, so the new one lies beside it.
        repeated(arguments.set, Path(folder), arguments.samples)
        for _ in range(arguments.rounds):
            for name, options in contestants.items():
                seconds[name].append(first_batch(Path(folder), **options))
    results = {}
    for name, values in seconds.items():
        opened, first = (statistics.median(column) for column in zip(*values, strict=True))
        results[name] = {"open_s": round(opened, 3), "first_batch_s": round(first, 3), "rounds": values}
        print(f"{name:20} open {opened:.2f} s, first batch {first:.2f} s more")
    if arguments.json:
        record = {
            "what": "seconds to an open ImageLoader and to its first batch of 256",
            "samples": arguments.samples,
            "commit": commit(),
            "cpu": cpu_name(),
            "cores": len(usable_cores()),
            "results": results,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
