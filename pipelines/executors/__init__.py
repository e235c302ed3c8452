"""The pipelines. Each one executes a plan on shards and yields batches."""

__all__ = ["dali", "ffcv", "native", "registry", "synthetic", "torchvision", "views"]
