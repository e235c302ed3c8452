"""Makes shard sets of images where they lie: looks at their headers and writes an index."""

__all__ = ["command"]
