"""A model's blocks compiled, each by itself: like blocks share their graphs, and compiling takes seconds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["compile_blocks"]

_GRAPHS = 64  # of one kind of block: image sizes, micro batches, evaluation; beyond torch's 8 it would run uncompiled


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles them when they are first called, for this process; sets two of torch.compile's global options."""
    torch._dynamo.config.recompile_limit = _GRAPHS
    # DDP's own way of cutting graphs at its buckets: blocks are smaller already, and what is cut in the forward pass
    # and not in its recomputation (checkpointing) is an error.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        block.compile()
