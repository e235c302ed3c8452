"""Shared parts of the tests of hostile shards: manifests for any file, and a process that opens sets within limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from conversion import write_manifest
from faults import ROOT

from sdpnet.preprocess.encoding.encode import EncodedImage

NUM_SAMPLES = 6
# Opens the split "train" of each folder and reads all of its images. The process ends if it takes more than 256 MB, or
# more than 1 s of processor time for a folder.
OPEN = """
import json, resource, signal, sys
from sdpnet.pipelines.errors import ShardError
from sdpnet.pipelines.shards.layout import open_split
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in json.load(sys.stdin):
    signal.setitimer(signal.ITIMER_PROF, 1)
    try:
        _, reader = open_split(folder, "train")
        answer = f"opened, {sum(len(reader.encoded(index).tobytes()) for index in range(reader.num_samples))} bytes"
    except ShardError as error:
        answer = f"refused: {error}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer), flush=True)
"""


def answers(folders: Iterable[Path], anywhere: bool = False) -> list[str]:
    """Opens each folder in the process, and returns its answers. The process must have answered for all of them.

    Each refusal must name the folder, unless the wrong file may lie `anywhere`.
    """
    asked = [str(folder) for folder in folders]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"status {done.returncode} at {asked[len(said)]}: {done.stderr[-2000:]}"
    for folder, answer in zip(asked, said, strict=True):
        named = anywhere or folder in answer
        assert answer.startswith("opened") or (named and "\n" not in answer), answer
    return said


def make_set(folder: Path, name: str, num_samples: int) -> None:
    """Writes a manifest that fits the file `name`, whatever is in it, with 100 classes."""
    folder.mkdir(exist_ok=True)
    size = (folder / name).stat().st_size
    file = {"name": name, "num_samples": num_samples, "bytes": size, "sha256": "", "sidecars": {}, "hashed_from": 0}
    split = {"num_samples": num_samples, "format": name.rpartition(".")[2], "files": [file]}
    split |= {"num_quarantined": 0, "num_kept": 0}
    raw = {"schema_version": 3, "source": "", "classes": [str(label) for label in range(100)], "encode": {}}
    raw |= {"splits": {"train": split}, "created_by": "", "quarantine_sha256": None}
    write_manifest(folder, raw)


def claimed_images() -> list[EncodedImage]:
    """Bytes that are no images; the layout does not decode them."""
    return [EncodedImage(bytes([index]) * (60 + 70 * index), 10 + index, 20) for index in range(NUM_SAMPLES)]


def hostile_number(rng: np.random.Generator, bits: int, near: int) -> int:
    """A random number of at most `bits` bits: small, close to a power of two, close to `near`, or any."""
    kind = rng.integers(4)
    number = (
        int(rng.integers(3)),
        (1 << int(rng.integers(bits + 1))) + int(rng.integers(-1, 2)),
        near + int(rng.integers(-2, 3)) * int(rng.choice([1, 24, 512])),
        int(rng.integers(1 << 62)) << 2,
    )[kind]
    return number % (1 << bits)
