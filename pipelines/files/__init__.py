"""Files on the disk: opened safely, read in part, locked, and published whole."""

__all__ = ["atomic_write", "regular", "small"]
