"""Opens, reads, locks and publishes files on disk."""

__all__ = ["atomic_write", "regular", "small"]
