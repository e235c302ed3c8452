"""How a step is executed on this hardware: dtype, memory format, compilation, micro-batches, threads."""

__all__ = [
    "compiled",
    "depthwise_choice",
    "hardware",
    "memory_format",
    "micro_batch",
    "side_stream",
    "sync_norm",
    "threads",
]
