"""Compilation of a model's blocks, one by one. Blocks of one kind share their graphs, so compiling takes seconds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["compile_blocks"]

# torch.compile makes a new graph of a block for each image size, for each size of a micro batch and for evaluation.
# With more than `recompile_limit` graphs (torch's default is 8) it runs the block uncompiled, after a single warning.
_GRAPHS = 64


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles each block when it is first called. Sets two global options of torch.compile in this process."""
    torch._dynamo.config.recompile_limit = _GRAPHS
    # With this option, torch.compile cuts graphs at DDP's buckets, but only in the forward pass. The recomputation of a
    # checkpointed block then has other graphs than its forward pass, which is an error. Blocks are smaller than buckets
    # anyway.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        block.compile()
