"""The device stage's operations in PyTorch, the reference for every other implementation."""

__all__ = ["box_masks", "filters", "geometry", "mix", "noise", "operations"]
