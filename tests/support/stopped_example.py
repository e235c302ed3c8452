"""Runs a script and ends its process, as `kill -9` would, when a training has asked for a number of batches.

python stopped_example.py BATCHES SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from typing import Any

from sdpnet import ImageLoader

if __name__ == "__main__":
    remaining, begin = int(sys.argv[1]), ImageLoader.__iter__

    def counted(batches: Iterator[Any]) -> Iterator[Any]:
        global remaining
        for batch in batches:
            if not remaining:
                os._exit(9)
            remaining -= 1
            yield batch

    def counted_in_training(loader: ImageLoader) -> Iterator[Any]:
        return counted(begin(loader)) if loader.stage.train else begin(loader)

    ImageLoader.__iter__ = counted_in_training  # type: ignore[method-assign]
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
