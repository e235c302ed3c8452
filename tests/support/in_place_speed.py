"""Times images in place: python tests/support/in_place_speed.py --images DIR [--repeat N] [--json FILE]

DIR has JPEGs in class folders. They are copied N times into a larger folder, and into ILSVRC2012-like tars.

    index      the command `adopt` on the folder and on the tars, in turn: listing, headers, index, manifest. The start
               of Python and the imports are not counted. Worth measuring with 20,000 images or more: --only index
    read       the native pipeline, in turn, on the same cores, with all files in memory:
        shards     a .beton file with the same bytes of each image
        folder     the folder in place
        tars       the tars in place
        kept       a .beton file of `build_ffcv --reencode never`, whose JPEGs have restart markers (for comparison)

The order is reversed from round to round. Ratios are those of each round, and the median of them is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conversion import write_manifest, write_samples
from in_place_sets import as_ilsvrc_tars

from sdpnet.pipelines.benchmarks.process import BenchProcess
from sdpnet.pipelines.benchmarks.worker import Job
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.pipelines.shards.manifest import SCHEMA_VERSION, Split
from sdpnet.preprocess.conversion.writers.beton import BetonWriter
from sdpnet.preprocess.encoding.encode import EncodedImage

ROOT = Path(__file__).resolve().parents[2]
GOALS = {"folder": 0.9, "tars": 0.97}


def copies(images: Path, root: Path, repeat: int) -> int:
    """Copies each image `repeat` times into train/; the first image of each class is val/. Returns their number."""
    count = 0
    for folder in sorted(path for path in images.iterdir() if path.is_dir()):
        for split, number in (("train", repeat), ("val", 1)):
            (root / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[: None if split == "train" else 1]:
                content = path.read_bytes()
                for copy in range(number):
                    (root / split / folder.name / f"{path.stem}_{copy:03}{path.suffix}").write_bytes(content)
                    count += 1
    return count


def run(script: str, *arguments: str | Path) -> float:
    """Runs a command of preprocess/. Returns its images/s."""
    command = [sys.executable, str(ROOT / "preprocess" / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, check=True)
    found = re.search(r"[\d,]+ images in [\d,.]+ s, ([\d,]+) images/s", done.stdout)
    assert found is not None, done.stdout
    return int(found[1].replace(",", ""))


def same_bytes(in_place: Path, out: Path) -> None:
    """Writes the train images of a set in place into a .beton file, byte for byte."""
    _, reader = open_split(in_place, "train")
    images = [
        EncodedImage(reader.encoded(sample).tobytes(), *reader.sizes[sample].tolist())
        for sample in range(reader.num_samples)
    ]
    out.mkdir()
    files = write_samples(BetonWriter, out, "train", images)
    raw = {"schema_version": SCHEMA_VERSION, "source": "", "classes": list(map(str, range(len(images)))), "encode": {}}
    splits = {"train": Split(len(images), "beton", files).to_dict()}
    write_manifest(out, {**raw, "splits": splits, "created_by": "", "quarantine_sha256": None})


def read(sets: dict[str, Path], image_size: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """The images/s of each set in each round."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    rates: dict[str, list[float]] = {name: [] for name in sets}
    with ExitStack() as stack:
        processes, batches = {}, {}
        for name, data in sets.items():
            job = Job("native", str(data), "train", "train", image_size, 64, cores, "cpu")
            processes[name] = stack.enter_context(BenchProcess(job))
            processes[name].start()
            batches[name] = processes[name].calibrate(seconds)
        for number in range(rounds + 1):
            for name in sets if number % 2 else reversed(sets):
                rate = processes[name].round(batches[name]).rate
                if number:  # the first round warms up
                    rates[name].append(rate)
                    print(f"read, round {number}: {name}: {rate:,.0f} images/s", file=sys.stderr, flush=True)
    return rates


def result(name: str, values: list[float], reference: list[float] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"what": name, "images_per_second": [round(value, 1) for value in values]}
    found["median"] = round(statistics.median(values), 1)
    if reference is not None:
        ratios = [mine / its for mine, its in zip(values, reference, strict=True)]
        found |= {"ratios": [round(ratio, 3) for ratio in ratios], "ratio": round(statistics.median(ratios), 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Times images in place: indexing them, and reading them.")
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", required=True, help="JPEGs in class folders")
    add("--repeat", type=int, default=4, help="copies of each image (default: %(default)s)")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--seconds", type=float, default=8, help="of a round of reading (default: %(default)s)")
    add("--image-size", type=int, default=224, help="default: %(default)s")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="that index (default: one a core)")
    add("--only", choices=["index", "read"], help="leave the other part out")
    add("--scratch", type=Path, metavar="DIR", help="where the copies lie (default: a temporary folder)")
    add("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        root = Path(scratch)
        count = copies(arguments.images, root / "folder", arguments.repeat)
        as_ilsvrc_tars(root / "folder", root / "tars")
        kinds = ("folder", "tars")
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(arguments.rounds + 1 if arguments.only != "read" else 1):
            for kind in kinds if number % 2 else reversed(kinds):
                flags = ("--source", root / kind, "--out", root / f"{kind}-set", "--workers", str(arguments.workers))
                rate = run("adopt", *flags, *["--replace"][:number])
                if number:
                    rates[kind].append(rate)
                    print(f"index, round {number}: {kind}: {rate:,.0f} images/s", file=sys.stderr, flush=True)
        if arguments.only != "read":
            results["index"] = [result(kind, values, None) for kind, values in rates.items()]
        if arguments.only != "index":
            sets = {"shards": root / "shards", **{kind: root / f"{kind}-set" for kind in kinds}, "kept": root / "kept"}
            same_bytes(sets["folder"], sets["shards"])
            run(
                "build_ffcv",
                "--source",
                root / "folder",
                "--out",
                sets["kept"],
                "--reencode",
                "never",
                "--max-side",
                "0",
            )
            measured = read(sets, arguments.image_size, arguments.rounds, arguments.seconds)
            results["read"] = [result(name, values, measured["shards"]) for name, values in measured.items()]
    for part, rows in results.items():
        for row in rows:
            goal = f" (goal: {GOALS[row['what']]})" if part == "read" and row["what"] in GOALS else ""
            ratio = f", {row['ratio']:.3f} of shards{goal}" if "ratio" in row else ""
            print(f"{part}: {row['what']}: {row['median']:,.0f} images/s{ratio}")
    if arguments.json:
        facts = {"num_images": count, "image_size": arguments.image_size, "cores": len(os.sched_getaffinity(0))}
        arguments.json.write_text(json.dumps({**facts, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
