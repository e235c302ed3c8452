"""Stock FFCV's `DatasetWriter`, in a process of its own.

The writer forks its workers and waits forever if one of them dies. This has happened in a process in which other tests
had used DALI, whose objects do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["write_with_ffcv"]


def write_with_ffcv(files: dict[Path, str], samples: Sequence[tuple[np.ndarray, int]]) -> None:
    """Writes samples (uint8 (H, W, 3), label) to each of `files`, whose values are write modes: "jpg" or "raw"."""
    work = pickle.dumps(([(str(path), mode) for path, mode in files.items()], list(samples)))
    subprocess.run([sys.executable, __file__], input=work, check=True, timeout=120, stderr=subprocess.DEVNULL)


def main() -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    # Python 3.14 starts a server by default, which FFCV's workers are not made for.
    multiprocessing.set_start_method("fork", force=True)
    files, samples = pickle.load(sys.stdin.buffer)
    for path, write_mode in files:
        fields = {"image": RGBImageField(write_mode=write_mode, jpeg_quality=95), "label": IntField()}
        DatasetWriter(path, fields, num_workers=2).from_indexed_dataset(samples, chunksize=4)


if __name__ == "__main__":
    main()
