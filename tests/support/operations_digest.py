"""Prints the instruction set that torch uses, and a digest of every operation's results: operations_digest.py [DEVICE].

tests/pipelines/test_operations.py runs it once for each instruction set that torch has code for on this processor.
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import torch

from sdpnet.pipelines.augment.reference.operations import apply_operations
from sdpnet.pipelines.planning.policies import Operation

LIMITS = {
    Operation.TRANSLATE_X: (-15.0, 15.0),
    Operation.TRANSLATE_Y: (-15.0, 15.0),
    Operation.ROTATE: (-30.0, 30.0),
    Operation.POSTERIZE: (0.0, 8.0),
    Operation.SOLARIZE: (0.0, 256.0),
    Operation.SOLARIZE_ADD: (0.0, 128.0),
    Operation.GAUSSIAN_BLUR: (0.1, 2.0),
}
EACH = 5  # samples of each operation, each followed by a second operation


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    rng, digest = np.random.default_rng(5), hashlib.sha256()
    count = EACH * len(Operation)
    for mode, fill in (("nearest", (0.0, 0.0, 0.0)), ("bilinear", (0.0, 0.0, 0.0)), ("bilinear", (124.0, 116.5, 14.0))):
        images = torch.from_numpy(rng.integers(0, 256, (count, 3, 37, 45), np.uint8)).to(device)
        first, then = np.repeat(np.array(Operation, np.uint8), EACH), rng.integers(0, len(Operation), count, np.uint8)
        operations = np.stack([first, then], 1)
        magnitudes = [[rng.uniform(*LIMITS.get(Operation(kind), (-0.9, 0.9))) for kind in row] for row in operations]
        out = apply_operations(images, operations, np.array(magnitudes, np.float32), interpolation=mode, fill=fill)
        digest.update(out.cpu().numpy().tobytes())
    print(torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device, digest.hexdigest())


if __name__ == "__main__":
    main()
