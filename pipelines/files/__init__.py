"""Opens, reads, locks and publishes files on disk."""

__all__ = ["array_file", "atomic_write", "regular", "small"]
