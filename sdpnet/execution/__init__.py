"""The execution of a step on this hardware: dtype, memory format, compilation, micro batches and threads."""

__all__ = [
    "compiled",
    "data_wait",
    "hardware",
    "memory_format",
    "micro_batch",
    "side_stream",
    "sync_norm",
    "threads",
]
