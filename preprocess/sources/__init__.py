"""Where images come from: class folders, archives, lists of labels."""

__all__ = ["listing", "scan", "splits"]
