"""The race between pipelines: contestants, ceilings and the processes that time them."""

__all__ = ["augment", "ceilings", "flags", "peers", "process", "race", "stream", "worker"]
