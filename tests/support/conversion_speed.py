"""Times our conversion against FFCV's own writer: python tests/support/conversion_speed.py --images DIR [--json FILE]

DIR has images in class folders. They are repeated, as links, in a larger folder. The following take turns in converting
it, with the same settings (500 px, quality 90) and the same number of worker processes:

    ffcv           FFCV's DatasetWriter
    always, auto   the command `build_ffcv.py --reencode always | auto`: listing, encoding, writing, checksums
    tars           the command `build_dali.py`, re-encoding

The start of Python and the imports are not counted. The order is reversed from round to round.

--within skips images whose longer side is over 500 px. Peak memory is the sum over a command's processes; shared pages
count in each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
MAX_SIDE = 500
COMMANDS = {
    "always": ["build_ffcv.py", "--reencode", "always"],
    "auto": ["build_ffcv.py", "--reencode", "auto"],
    "tars": ["build_dali.py", "--reencode", "always"],
}


class Folder:
    """The images in class folders for FFCV's writer, decoded as by torchvision's ImageFolder."""

    def __init__(self, root: Path) -> None:
        classes = sorted(path for path in root.iterdir())
        self.samples = [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return Image.open(path).convert("RGB"), label


def write_with_ffcv(root: Path, out: Path, workers: int) -> None:
    """Converts `root` and prints the seconds. It runs in a process of its own."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    images = Folder(root)
    began = time.monotonic()
    image = RGBImageField(write_mode="jpg", max_resolution=MAX_SIDE, jpeg_quality=90)
    DatasetWriter(str(out), {"image": image, "label": IntField()}, num_workers=workers).from_indexed_dataset(images)
    print(time.monotonic() - began)


def peak_memory(process: subprocess.Popen[str]) -> int:
    """Waits for a process. Returns the peak of the resident memory of it and its descendants together, in bytes."""
    peak = 0
    while process.poll() is None:
        parents, resident = {}, {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry.name)] = int(fields[1])
                resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGESIZE")
        family = {process.pid}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        peak = max(peak, sum(resident.get(pid, 0) for pid in family))
        time.sleep(0.2)
    return peak


def run(name: str, root: Path, out: Path, workers: int) -> tuple[float, int]:
    """Seconds and peak memory of one conversion."""
    shutil.rmtree(out, ignore_errors=True)
    if name == "ffcv":
        out.mkdir()
        command = [__file__, "--ffcv", str(root), str(out / "train.beton"), "--workers", str(workers)]
    else:
        script, *flags = COMMANDS[name]
        command = [str(ROOT / "preprocess" / script), "--train", str(root), "--out", str(out), *flags]
        command += ["--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    memory = peak_memory(process)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{name} ended with status {process.returncode}")
    if name == "ffcv":
        return float(output), memory
    took = re.search(r"([\d,]+) images in [\d,.]+ s, ([\d,]+) images/s", output)
    assert took is not None, output
    count, rate = (int(number.replace(",", "")) for number in took.groups())
    return count / rate, memory


def links(images: Path, root: Path, repeat: int, within: bool) -> int:
    """Makes class folders with `repeat` links to each image. Returns the number of links."""
    count = 0
    for folder in sorted(path for path in images.iterdir() if path.is_dir()):
        (root / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir()):
            if within and max(Image.open(path).size) > MAX_SIDE:
                continue
            for number in range(repeat):
                (root / folder.name / f"{path.stem}_{number:03}{path.suffix}").symlink_to(path.resolve())
                count += 1
        if not any((root / folder.name).iterdir()):
            (root / folder.name).rmdir()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Times our conversion against FFCV's own writer.")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images in class folders")
    parser.add_argument("--repeat", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--within", action="store_true", help=f"only images of at most {MAX_SIDE} px")
    parser.add_argument("--only", default="ffcv,always,auto,tars", help="default: %(default)s")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where shards are written (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--ffcv", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ffcv:
        write_with_ffcv(*arguments.ffcv, arguments.workers)
        return
    names = arguments.only.split(",")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = dict.fromkeys(names, 0)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        count = links(arguments.images, Path(scratch) / "images", arguments.repeat, arguments.within)
        for round_ in range(arguments.rounds):
            for name in names if round_ % 2 == 0 else reversed(names):
                took, peak = run(name, Path(scratch) / "images", Path(scratch) / "shards", arguments.workers)
                seconds[name].append(took)
                memory[name] = max(memory[name], peak)
                print(f"round {round_ + 1}: {name}: {count / took:,.0f} images/s", file=sys.stderr, flush=True)
    rates = {name: [count / took for took in values] for name, values in seconds.items()}
    table = Table("conversion", "images/s (median)", "lowest", "highest", "times ffcv", "peak MB")
    results = []
    for name, values in rates.items():
        pairs = [mine / its for mine, its in zip(values, rates.get("ffcv", values), strict=True)]
        results.append(
            {
                "conversion": name,
                "images_per_second": [round(value, 1) for value in values],
                "median": round(statistics.median(values), 1),
                "times_ffcv": [round(ratio, 2) for ratio in pairs],
                "median_times_ffcv": round(statistics.median(pairs), 2),
                "peak_memory_bytes": memory[name],
            }
        )
        table.add_row(
            name,
            *(f"{value:,.0f}" for value in (statistics.median(values), min(values), max(values))),
            f"{statistics.median(pairs):.2f}" if "ffcv" in rates else "-",
            f"{memory[name] / 1e6:,.0f}",
        )
    Console().print(table)
    if arguments.json:
        facts = {"num_images": count, "within_limit_only": arguments.within, "workers": arguments.workers}
        arguments.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
