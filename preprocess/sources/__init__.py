"""Finds the images to convert: class folders, tar archives and lists of labels."""

__all__ = ["listing", "scan", "splits"]
