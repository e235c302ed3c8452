"""Stock FFCV's `DatasetWriter`, in a process of its own.

It forks its workers, and waits for ever when one dies: in a process where other tests have used DALI, whose objects do
not survive a fork, both have happened.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["write_with_ffcv"]


def write_with_ffcv(path: Path, samples: Sequence[tuple[np.ndarray, int]], write_mode: str) -> None:
    """Writes (uint8 (H, W, 3), label) samples to `path`; `write_mode` is "jpg" or "raw"."""
    command = [sys.executable, __file__, str(path), write_mode]
    subprocess.run(command, input=pickle.dumps(list(samples)), check=True, timeout=120, stderr=subprocess.DEVNULL)


def main(path: str, write_mode: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    samples = pickle.load(sys.stdin.buffer)
    fields = {"image": RGBImageField(write_mode=write_mode, jpeg_quality=95), "label": IntField()}
    DatasetWriter(path, fields, num_workers=2).from_indexed_dataset(samples, chunksize=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
