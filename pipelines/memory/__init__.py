"""Memory for batches that is used again when nobody holds the batch any more."""

__all__ = ["buffers"]
