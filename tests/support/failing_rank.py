"""`train` with an error in one process at a step, counted from 1: python failing_rank.py RANK STEP ARGUMENTS..."""

from __future__ import annotations

import os
import sys
from typing import Any

import sdpnet.train

if __name__ == "__main__":
    rank, failing, *arguments = sys.argv[1:]
    take_step = sdpnet.train.take_step

    def taking(run: Any, *rest: Any) -> Any:
        if os.environ["RANK"] == rank and run.cursor.step + 1 == int(failing):
            raise RuntimeError("a fault of this process alone")
        return take_step(run, *rest)

    sdpnet.train.take_step = taking
    sys.exit(sdpnet.train.main(arguments))
